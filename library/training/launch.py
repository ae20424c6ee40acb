"""Composition root of training: settings in, a finished run out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from library.errors import UserError
from library.log import get_logger
from library.training import early
from library.training.assemble import assemble
from library.training.optim import check_resumed, noted_classes
from library.training.precision import fp16_gradient_scaler
from library.training.prepare import prepare
from library.training.state import Progress, TrainingState
from library.training.tensor_step import fit_state
from library.training.trainable import Trainable
from library.training.update import Update

if TYPE_CHECKING:
    from library.config.cli import RunConfig

log = get_logger(__name__)


def train(cfg: RunConfig, trainable: Trainable) -> Progress:
    """Train `trainable` as `cfg` says, on every process that the launcher started; returns where the run ended.

    Raises UserError for everything a user can mend, as early as it can be known.
    """
    for notice in cfg.notices:
        log.info(notice)
    accelerator = _accelerator(cfg, trainable)
    early.check(cfg, accelerator)
    run = prepare(cfg, trainable, accelerator)
    trainer, state = assemble(run)
    if cfg.loop.resume:
        _resume(Path(cfg.loop.resume), state, trainer.update)
    try:
        trainer.run()
        trainer.data.finish_filling()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU ran out of memory: {str(error).splitlines()[0]}",
            where=f"step {trainer.view.progress.global_step + 1}",
            fix=f"use {_memory_savers(cfg, trainable)}, a smaller --train_batch_size or a smaller --resolution",
        ) from error
    finally:
        trainer.data.close()
    accelerator.end_training()
    if trainer.view.failure is not None:
        raise trainer.view.failure
    return trainer.view.progress


def _memory_savers(cfg: RunConfig, trainable: Trainable) -> str:
    common = "--gradient_checkpointing, --mixed_precision bf16, --cache_latents, --cache_text_encoder_outputs"
    if trainable.owns:
        return f"{common}, --full_bf16, --fused_backward_pass, --optimizer_type Adafactor"
    if hasattr(trainable, "tokens"):
        return "--gradient_checkpointing, --mixed_precision bf16, --cache_latents"
    if "frozen" not in cfg.groups:
        return common
    return f"{common} with --network_train_unet_only, --fp8_base"


def _accelerator(cfg: RunConfig, trainable: Trainable) -> Accelerator:
    on_cpu = not torch.cuda.is_available()
    if on_cpu and cfg.loop.mixed_precision == "fp16":
        raise UserError("fp16 mixed precision needs a GPU", where="--mixed_precision fp16", fix='use "no" or "bf16"')
    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=trainable.may_skip_modules, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    accelerator = Accelerator(mixed_precision=cfg.loop.mixed_precision, cpu=on_cpu, kwargs_handlers=[ddp])
    if cfg.precision.full_fp16:
        accelerator.scaler = fp16_gradient_scaler()
    return accelerator


def _resume(folder: Path, state: TrainingState, update: Update) -> None:
    """Load the state, and say what of it overrules this run's settings or cannot be exact."""
    optimizer = update.optimizer

    def rates() -> list[float | None]:
        return [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]

    asked = rates()
    built = noted_classes(optimizer)
    sentences = state.load(folder)
    check_resumed(optimizer, built, where=f"--resume {folder}")
    sentences += [sentence for sentence in [fit_state(optimizer, update.widening)] if sentence]
    if rates() != asked:
        sentences.append(
            f"the learning rates are the state's {rates()}, not {asked} of this run; to change them, start from its "
            "weights with --network_weights instead"
        )
    for sentence in sentences:
        log.warning(f"--resume {folder}: {sentence}")
