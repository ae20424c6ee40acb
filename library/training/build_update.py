"""Which update a run makes: inside the backward pass or after it; in float32 where weights are half precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError
from library.training.fused import FusedUpdate
from library.training.tensor_step import Widening, looks_across_tensors, widen_modes
from library.training.update import GuardedUpdate, Update

if TYPE_CHECKING:
    from library.config.cli import RunConfig

Build = Callable[["RunConfig", list[dict[str, Any]]], torch.optim.Optimizer]


def check(cfg: RunConfig, build: Build, *, num_processes: int) -> None:
    """Refuse a fused update that cannot be right, before the model is loaded. build: from `early`, makes optimizers."""
    name = _fused_option(cfg)
    if name is None:
        return
    if num_processes > 1:
        raise UserError(
            f"{name} needs a single process: it would step each of {num_processes} on its own gradient, before the "
            "gradients of all are averaged",
            where=f"--{name}",
            fix=f"remove {name}, or start one process",
        )
    reason = looks_across_tensors(partial(build, cfg))
    if reason:
        raise UserError(
            f"{cfg.optim.optimizer_type} cannot be stepped one tensor after the other: {reason}",
            where=f"--{name}",
            fix=f"remove {name}, or use an optimizer whose update is per tensor, such as AdamW, AdamW8bit or Adafactor",
        )


def build_update(
    cfg: RunConfig,
    build: Build,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None,
    run_seed: int,
    global_step: Callable[[], int],
) -> Update:
    """The update of a run. build: makes more optimizers of the run's kind. global_step: the step under way, from 0."""
    precision = cfg.precision
    widening = None
    if precision.full_fp16 or (precision.full_bf16 and precision.stochastic_rounding):
        widening = Widening(run_seed, global_step, stochastic=precision.full_bf16)
    if widening is not None:
        widen_modes(optimizer, widening)
    if _fused_option(cfg) is not None:
        groups = None if precision.fused_backward_pass else precision.fused_optimizer_groups
        return FusedUpdate(optimizer, groups, widening)
    by_tensor = widening is None or not looks_across_tensors(partial(build, cfg))
    return GuardedUpdate(optimizer, cfg.optim.max_grad_norm, scaler, widening, by_tensor)


def _fused_option(cfg: RunConfig) -> str | None:
    """The option that asks for a fused update; the backward pass wins over the groups, as in sd-scripts."""
    if cfg.precision.fused_backward_pass:
        return "fused_backward_pass"
    return "fused_optimizer_groups" if cfg.precision.fused_optimizer_groups else None
