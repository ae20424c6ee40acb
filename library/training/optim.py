"""Optimizers by name, and the guarded update: clip, then step only when the gradient is finite."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.training.trainable import ParamGroup


def _adamw(groups: list[dict], lr: float, arguments: dict[str, Any]) -> torch.optim.Optimizer:
    fused = all(p.is_floating_point() for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=lr, **{"fused": fused, **arguments})


def _adamw_8bit(groups: list[dict], lr: float, arguments: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"AdamW8bit needs bitsandbytes, which does not load here ({error})",
            where="--optimizer_type",
            fix="install the version pinned in requirements.txt, or use AdamW",
        ) from error
    return AdamW8bit(groups, lr=lr, **arguments)


def _adafactor(groups: list[dict], lr: float, arguments: dict[str, Any]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # sd-scripts' rule: relative steps unless told otherwise, warm-up only with them; they set the rate themselves.
    relative = arguments.setdefault("relative_step", True)
    if arguments.get("warmup_init"):
        relative = arguments["relative_step"] = True
    if relative:
        groups = [{**group, "lr": None} for group in groups]
    return Adafactor(groups, lr=None if relative else lr, **arguments)


BUILDERS = {"adamw": _adamw, "adamw8bit": _adamw_8bit, "adafactor": _adafactor}


def _by_dotted_path(path: str) -> type[torch.optim.Optimizer]:
    module_name, _, class_name = path.rpartition(".")
    where = "--optimizer_type"
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise UserError(
            f"cannot import {module_name!r}: {error}", where=where, fix="install it or fix the path"
        ) from error
    except AttributeError as error:
        raise UserError(f"{module_name} has no {class_name!r}", where=where, fix="check the class name") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"{path} is not an optimizer class", where=where, fix="name a torch.optim.Optimizer subclass")
    return found


def build_optimizer(
    groups: Sequence[ParamGroup], *, optimizer_type: str, learning_rate: float, arguments: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer over `groups` (each with its own rate).

    optimizer_type: a name of BUILDERS in any case, or a dotted class path.
    arguments: keywords for the class. Raises UserError for an unknown name or an argument the class refuses.
    """
    keywords = dict(arguments)
    plain = [dict(group) for group in groups]
    builder = BUILDERS.get(optimizer_type.lower())
    try:
        if builder is not None:
            return builder(plain, learning_rate, keywords)
        path = optimizer_type if "." in optimizer_type else f"torch.optim.{optimizer_type}"
        return _by_dotted_path(path)(plain, lr=learning_rate, **keywords)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{optimizer_type} refuses its arguments: {error}",
            where="--optimizer_args",
            fix="remove or correct the argument named above",
        ) from error


@dataclass
class GuardedUpdate:
    """Clips by global norm and steps the optimizer unless the gradient holds an inf or a NaN.

    On CUDA with a fused optimizer the decision stays on the device (the fused kernels take `found_inf`); elsewhere it
    costs one read of a scalar per step. A skipped step leaves parameters and optimizer state as they were; `skipped`
    counts them (0-d float32 tensor on the parameters' device). With an fp16 gradient scaler, which has its own check,
    the scaler decides.
    """

    optimizer: torch.optim.Optimizer
    max_norm: float
    scaler: torch.amp.GradScaler | None = None
    skipped: Tensor = field(init=False)
    params: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.skipped = torch.zeros((), device=self.params[0].device)

    def __call__(self) -> Tensor:
        """Clip, step, clear the gradients; return the global L2 norm before clipping (0-d float32)."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).float()
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.max_norm, norm)
        bad = (~torch.isfinite(norm)).float().reshape(())
        self.skipped += bad.to(self.skipped.device)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif norm.is_cuda and self._is_fused():
            # What GradScaler itself hands to fused optimizers; the kernels then leave everything untouched.
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = bad
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _is_fused(self) -> bool:
        return all(group.get("fused") for group in self.optimizer.param_groups)
