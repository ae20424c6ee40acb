"""Optimizers by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

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
