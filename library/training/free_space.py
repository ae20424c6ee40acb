"""Whether the disk holds what a run plans to save, found out before its first step."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.log import get_logger
from library.training import naming

log = get_logger(__name__)

_ADAM = 8.0  # bytes per trained number: two float32 moments


@dataclass(frozen=True)
class Planned:
    """The most model files and states that lie on the disk at once, the one being written included."""

    models: int
    states: int


def planned(settings: Any, *, total_steps: int, num_epochs: int) -> Planned:
    """What the schedule and the keep rules of `settings` (save_*, with the period in epochs settled) come to."""
    s = settings
    steps = s.save_every_n_steps
    by_step = (total_steps - 1) // steps if steps else 0
    by_epoch = (num_epochs - 1) // s.save_every_n_epochs if s.save_every_n_epochs else 0

    def most(count: int, period: int | None, keep: int | None, to_remove: Callable[..., int | None]) -> int:
        return _most_at_once(count, period or 1, keep, to_remove) if count else 0

    models = most(by_step, steps, s.save_last_n_steps, naming.step_to_remove)
    models += most(by_epoch, s.save_every_n_epochs, s.save_last_n_epochs, naming.epoch_to_remove)
    states = 0
    if s.save_state:
        keep_steps = s.save_last_n_steps_state or s.save_last_n_steps
        keep_epochs = s.save_last_n_epochs_state or s.save_last_n_epochs
        states = most(by_step, steps, keep_steps, naming.step_to_remove)
        states += most(by_epoch, s.save_every_n_epochs, keep_epochs, naming.epoch_to_remove)
    at_end = 1 if s.save_state or s.save_state_on_train_end else 0
    return Planned(models + 1, states + at_end)


def _most_at_once(count: int, period: int, keep: int | None, to_remove: Callable[..., int | None]) -> int:
    """Follow the keep rule until it repeats itself: an old file goes only when the new one is there."""
    if keep is None:
        return count
    files: set[int] = set()
    most = 0
    for number in range(1, min(count, keep + 3) + 1):
        files.add(number * period)
        most = max(most, len(files))
        files.discard(to_remove(number * period, period, keep))
    return most


def optimizer_bytes(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> float:
    """Bytes of state per trained number, found by one step of an optimizer that `make` builds on a small matrix.

    Optimizers that need a GPU for a step are taken to keep two float32 moments.
    """
    parameter = torch.nn.Parameter(torch.zeros(128, 128))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = make([parameter])
        if hasattr(optimizer, "train"):  # the schedule-free ones
            optimizer.train()
        optimizer.step()
        return tensor_bytes(optimizer.state_dict()) / parameter.numel()
    except Exception as error:  # an estimate must not keep a run from starting
        log.debug(f"the optimizer's state cannot be measured: {error}")
        return _ADAM


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    return 0


def weight_bytes(tensors: Iterable[Tensor], dtype: torch.dtype | None) -> int:
    """Bytes of weights when stored in `dtype` (None: as they are)."""
    return sum(tensor.numel() * (dtype.itemsize if dtype else tensor.element_size()) for tensor in tensors)


def check(folder: Path, plan: Planned, *, model_bytes: int, state_bytes: int) -> None:
    """Warn when the planned saves do not fit into `folder`; raises UserError when not even one model does."""
    free = shutil.disk_usage(folder).free
    where = f"--output_dir {folder}"
    if free < model_bytes:
        raise UserError(
            f"one model takes about {_size(model_bytes)}, and {_size(free)} are free",
            where=where,
            fix="free some space or name a folder on another disk",
        )
    needed = plan.models * model_bytes + plan.states * state_bytes
    if free < needed:
        states = f" and {plan.states} of {_size(state_bytes)} (states)" if plan.states else ""
        log.warning(
            f"{where}: the planned saves need about {_size(needed)} at once: {plan.models} of {_size(model_bytes)} "
            f"(models){states}; {_size(free)} are free. Free some space, save less often, or let "
            "--save_last_n_steps or --save_last_n_epochs remove old ones"
        )


def _size(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**29 else f"{number / 2**20:.1f} MiB"
