"""Learning-rate schedules by the names of the diffusers library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from library.errors import UserError


def steps_from(value: int | float, total: int) -> int:
    """A length in optimizer steps: an int is a count, a float in 0..1 a share of `total` (truncated)."""
    return int(value * total) if isinstance(value, float) else value


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    total_steps: int,
    warmup: int | float,
    num_cycles: int = 1,
    power: float = 1.0,
    arguments: Mapping[str, Any] | None = None,
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule `name` over `total_steps` optimizer steps; it is stepped once per optimizer step on every rank.

    warmup: steps or a fraction of the total. Raises UserError where the schedule cannot warm up or refuses `arguments`.
    """
    from diffusers.optimization import get_scheduler

    warmup_steps = steps_from(warmup, total_steps)
    if name == "constant" and warmup_steps:
        raise UserError(
            f"the constant schedule has no warm-up, but lr_warmup_steps is {warmup}",
            where="--lr_scheduler",
            fix='use lr_scheduler = "constant_with_warmup", or lr_warmup_steps = 0',
        )
    if any(group["lr"] is None for group in optimizer.param_groups):
        return _Relative(optimizer)
    try:
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=total_steps,
            num_cycles=num_cycles,
            power=power,
            **(arguments or {}),
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the schedule {name} refuses its settings: {error}",
            where="--lr_scheduler_args",
            fix="remove or correct the argument named above",
        ) from error


class _Relative:
    """Stands in for a schedule when the optimizer (Adafactor with relative_step) sets its own rate."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        """Nothing to do: the optimizer derives the rate from its own step count."""

    def get_last_lr(self) -> list[float]:
        """The rate that the optimizer used last, per group (0.0 before the first step)."""
        rates = []
        for group in self.optimizer.param_groups:
            state = self.optimizer.state.get(group["params"][0], {})
            rates.append(float(self.optimizer._get_lr(group, state)) if state else 0.0)
        return rates

    def state_dict(self) -> dict:
        """Empty: the optimizer's state holds the step count."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""
