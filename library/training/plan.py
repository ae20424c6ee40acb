"""The plan of a run, printed before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from library.data.dataset import DataSummary, TrainData


@dataclass(frozen=True)
class Schedule:
    """How long a run is: optimizer steps, epochs begun, and the steps of its shortest and its longest epoch."""

    total_steps: int
    num_epochs: int
    shortest_epoch: int
    longest_epoch: int

    def text(self) -> str:
        """The length in words."""
        if self.shortest_epoch == self.longest_epoch:
            return f"{self.total_steps} in {self.num_epochs} epochs of {self.longest_epoch}"
        return (
            f"{self.total_steps} in {self.num_epochs} epochs of {self.shortest_epoch} to {self.longest_epoch}, as the "
            "resolutions are drawn anew in each"
        )


def schedule(data: TrainData, *, max_train_steps: int, max_train_epochs: int | None) -> Schedule:
    """Epochs win over steps when both are given, as in sd-scripts; epochs of several lengths are added up."""
    if data.epochs_are_equal:
        length = data.steps_in(0)
        total = length * max_train_epochs if max_train_epochs else max_train_steps
        return Schedule(total, -(-total // length), length, length)
    epochs = max_train_epochs or 0
    while not max_train_epochs and data.steps_before(epochs) < max_train_steps:
        epochs += 1
    total = data.steps_before(epochs) if max_train_epochs else max_train_steps
    lengths = [data.steps_in(epoch) for epoch in range(epochs)]
    return Schedule(total, epochs, min(lengths), max(lengths))


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
    row("steps", run.text())
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
