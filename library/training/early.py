"""What is settled before the model is loaded: everything that can be wrong without it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from library.errors import UserError
from library.inference.prompt_line import GenRequest, read_prompt_file
from library.inference.samplers import make_scheduler
from library.log import get_logger
from library.models import attention
from library.sizes import Size
from library.training import trackers
from library.training.lr import build_scheduler
from library.training.optim import build_optimizer
from library.training.state import read_description
from library.training.trainable import ParamGroup

if TYPE_CHECKING:
    from library.config.cli import RunConfig

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
    if accelerator.is_main_process:
        trackers.check(cfg)
    attention.check(xformers=cfg.model.xformers, device=accelerator.device)
    trial = optimizer(cfg, [{"name": "trial", "params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}])
    scheduler(cfg, trial, total_steps=1000)


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


def preview_requests(cfg: RunConfig, size: Size) -> list[GenRequest]:
    """The sample pictures of `--sample_prompts`; those that name no size get `size`."""
    if not cfg.preview.sample_prompts:
        return []
    requests = read_prompt_file(Path(cfg.preview.sample_prompts), size=size, sampler=cfg.preview.sample_sampler)
    for request in requests:  # a sampler that cannot do so many steps is known before the model is loaded
        make_scheduler(request.sampler, prediction_type="epsilon", steps=request.steps)
    return requests


def optimizer(cfg: RunConfig, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
    """The run's optimizer over `groups`."""
    return build_optimizer(
        groups,
        optimizer_type="AdamW8bit" if cfg.optim.use_8bit_adam else cfg.optim.optimizer_type,
        learning_rate=cfg.optim.learning_rate,
        arguments=cfg.optim.optimizer_kwargs(),
    )


def scheduler(cfg: RunConfig, of: torch.optim.Optimizer, *, total_steps: int) -> Any:
    """The run's learning-rate schedule over `total_steps` optimizer steps."""
    return build_scheduler(
        of,
        name=cfg.optim.lr_scheduler,
        total_steps=total_steps,
        warmup=cfg.optim.lr_warmup_steps,
        num_cycles=cfg.optim.lr_scheduler_num_cycles,
        power=cfg.optim.lr_scheduler_power,
        arguments=cfg.optim.scheduler_kwargs(),
    )
