"""What is settled before the model is loaded: everything that can be wrong without it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from library.errors import UserError
from library.inference.controls import check_samples
from library.inference.request import GenRequest
from library.inference.sample_prompts import read_prompt_file
from library.inference.samplers import make_scheduler
from library.log import get_logger
from library.models import attention, checkpoint
from library.models.prediction import schedule_for
from library.sizes import Size
from library.training import build_update, trackers
from library.training.draws import timestep_table
from library.training.lr import NOT_KNOWN_YET, build_scheduler, lr_settings
from library.training.objective import Objective
from library.training.optim import build_optimizer, try_out
from library.training.state import read_description
from library.training.trainable import FitsBase, ParamGroup, Trainable

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.training.prediction import Decision

log = get_logger(__name__)


def check(cfg: RunConfig, accelerator: Accelerator) -> None:
    """What can be known before minutes are spent on loading and caching."""
    if cfg.loop.resume:
        read_description(Path(cfg.loop.resume))
    try:
        Path(cfg.save.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder cannot be made ({error.strerror})",
            where=f"--output_dir {cfg.save.output_dir}",
            fix="name a folder that you may write to",
        ) from error
    timestep_table(cfg)
    Objective.of(cfg)
    if accelerator.is_main_process:
        trackers.check(cfg)
    attention.check(xformers=cfg.model.xformers, device=accelerator.device)
    weight = torch.nn.Parameter(torch.zeros(2, 2, device=accelerator.device))  # some optimizers take matrices only
    trial = optimizer(cfg, [{"name": "trial", "params": [weight], "lr": 1.0}])
    if "." in cfg.optim.optimizer_type:
        try_out(trial)
    scheduler(cfg, trial, total_steps=NOT_KNOWN_YET if cfg.loop.max_train_epochs else cfg.loop.max_train_steps)
    build_update.check(cfg, optimizer, num_processes=accelerator.num_processes)


def check_base(cfg: RunConfig, trainable: Trainable) -> None:
    """Whether the files that the run starts from fit its base model, by the headers of both.

    Where the base model has no header to read, this is found when it is loaded.
    """
    if not isinstance(trainable, FitsBase):
        return
    found = checkpoint.read_arch(cfg.model.pretrained_model_name_or_path or "")
    if found is not None:
        trainable.check_base(found)


def agreed_seed(cfg: RunConfig, accelerator: Accelerator) -> int:
    """The run's seed, the same on every rank: as given, else that of the resumed state, else a new one."""
    seed = cfg.loop.seed
    if seed is None and cfg.loop.resume:
        seed = read_description(Path(cfg.loop.resume))["facts"]["run_seed"]
    chosen = [seed if seed is not None else random.SystemRandom().randrange(2**32)]
    broadcast_object_list(chosen)
    if seed is None:
        log.info(f"seed {chosen[0]} (drawn, because --seed is not given)")
    return chosen[0]


def preview_requests(cfg: RunConfig, size: Size, decision: Decision) -> list[GenRequest]:
    """The sample pictures of `--sample_prompts`; those that name no size get `size`.

    Where no sampler is named at all, rectified flow is drawn by Euler's method, since euler_a cannot draw it. A sampler
    that cannot do so many steps, or cannot draw what `decision` trains, is known before the model is loaded.
    """
    if not cfg.preview.sample_prompts:
        return []
    kind = decision.prediction_type
    plain_flow = kind == "rectified_flow" and not cfg.is_given("sample_sampler")
    sampler = "euler" if plain_flow else cfg.preview.sample_sampler
    requests = read_prompt_file(Path(cfg.preview.sample_prompts), size=size, sampler=sampler)
    requests = _with_controls(cfg, requests)
    table = schedule_for(kind, zero_terminal_snr=decision.zero_terminal_snr, flow_shift=decision.flow_shift)
    for request in requests:
        make_scheduler(request.sampler, prediction_type=kind, steps=request.steps, schedule=table)
    return requests


def _with_controls(cfg: RunConfig, requests: list[GenRequest]) -> list[GenRequest]:
    """The requests with control images where the run follows them, which needs one for each, and nowhere else."""
    if "lllite" in cfg.groups:
        check_samples(requests, where=f"--sample_prompts {cfg.preview.sample_prompts}")
        return requests
    if any(request.control for request in requests):
        log.warning(
            "control images of --sample_prompts (--cn) have no effect: this run trains nothing that follows them"
        )
    return [replace(request, control=()) for request in requests]


def optimizer(cfg: RunConfig, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
    """The run's optimizer over `groups`."""
    return build_optimizer(
        groups,
        optimizer_type=cfg.optim.optimizer_type,
        learning_rate=cfg.optim.learning_rate,
        arguments=cfg.optim.optimizer_kwargs(),
    )


def scheduler(cfg: RunConfig, of: torch.optim.Optimizer, *, total_steps: int) -> Any:
    """The run's learning-rate schedule over `total_steps` optimizer steps."""
    return build_scheduler(of, lr_settings(cfg.optim), total_steps=total_steps)
