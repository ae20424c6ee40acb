"""The plan of a run, printed before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from library.data.batching import run_length
from library.data.dataset import DataSummary


@dataclass(frozen=True)
class Schedule:
    """How long a run is. `steps_per_epoch` and `total_steps` count optimizer steps."""

    steps_per_epoch: int
    total_steps: int

    @property
    def num_epochs(self) -> int:
        """Epochs begun by a run of `total_steps`."""
        return -(-self.total_steps // self.steps_per_epoch)


def schedule(steps_per_epoch: int, *, max_train_steps: int, max_train_epochs: int | None) -> Schedule:
    """The length of a run; epochs win over steps."""
    total = run_length(steps_per_epoch, max_train_steps=max_train_steps, max_train_epochs=max_train_epochs)
    return Schedule(steps_per_epoch, total)


def end_text(seconds_per_step: float | None, steps_left: int, *, now: datetime) -> str:
    """When `steps_left` steps will be done, in words."""
    if seconds_per_step is None:
        return f"after {steps_left} steps (too few to estimate the time)"
    length = timedelta(seconds=round(seconds_per_step * steps_left))
    return f"about {now + length:%Y-%m-%d %H:%M:%S}, in {length} ({seconds_per_step:.2f} s a step)"


def plan_text(
    data: DataSummary, groups: Sequence[Mapping[str, Any]], run: Schedule, *, batch: str, precision: str, end: str
) -> str:
    """Images, buckets, repeats, steps, epochs, trained parameters and the estimated end, one fact a line.

    batch: batch size x accumulation x processes in words. precision: of the weights and the mixed precision in words.
    end: from `end_text`.
    """
    lines = ["", "Plan"]

    def row(name: str, text: str) -> None:
        lines.append(f"  {name:<12} {text}")

    skipped = f", {len(data.skipped)} left out (listed above)" if data.skipped else ""
    row("images", f"{data.images} ({data.repeats} samples an epoch with repeats){skipped}")
    row("buckets", f"{len(data.buckets)} (listed above), mean aspect error {data.mean_ar_error:.4f}")
    row("batch", batch)
    row("steps", f"{run.total_steps} in {run.num_epochs} epochs of {run.steps_per_epoch}")
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        row("trains", f"{group['name']}: {count:,} parameters in {len(group['params'])} tensors, lr {_rate(group)}")
    row("precision", precision)
    row("end", end)
    return "\n".join(lines)


def _rate(group: Mapping[str, Any]) -> str:
    """The rate before the schedule changes it; None stands for an optimizer that sets its own."""
    rate = group.get("initial_lr", group["lr"])
    return "set by the optimizer" if rate is None else f"{rate:g}"
