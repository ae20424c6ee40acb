"""Numbers of a run: kept on the device between logging intervals, then written to JSONL, trackers and the bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch import Tensor

from library.training.bands import BandTotals
from library.training.broken_steps import BrokenSteps
from library.training.metering import StepTally
from library.training.trackers import Tracker

# What of a record depends on the machine; everything else is a function of the run alone.
MACHINE_KEYS = ("time", "images_per_second", "data_wait", "peak_memory_gib")


@dataclass
class _Pending:
    facts: dict[str, Any]
    scalars: dict[str, Tensor]
    tally: StepTally | None


@dataclass
class Meters:
    """Collects per-step tensors and turns a whole interval into Python numbers with one transfer.

    every: steps of a logging interval; its last record (and that of step `last`) holds the loss by timestep band.
    average: exponential moving average of the loss (decay 0.98, started at the first loss): the curve people read.
    broken: counts the steps whose loss or gradient is not finite.
    """

    every: int = 1
    last: int = 0
    average: float | None = None
    broken: BrokenSteps = field(default_factory=BrokenSteps)
    _bands: BandTotals = field(default_factory=BandTotals)
    _pending: list[_Pending] = field(default_factory=list)

    def update(self, facts: dict[str, Any], scalars: Mapping[str, Tensor], tally: StepTally | None = None) -> None:
        """Keep one step: `facts` are host values, `scalars` 0-d tensors that are not read yet."""
        self._pending.append(_Pending(facts, {name: value.detach().float() for name, value in scalars.items()}, tally))

    def flush(self) -> list[dict[str, Any]]:
        """One record per kept step, oldest first, with `loss_average` added; reads the device once.

        Steps whose loss or gradient is not finite cost one more read, to name their images.
        """
        if not self._pending:
            return []
        flat = [value.reshape(-1) for step in self._pending for value in step.scalars.values()]
        flat += [step.tally.bands for step in self._pending if step.tally is not None]
        numbers = torch.cat(flat).tolist()
        bands_start = sum(len(step.scalars) for step in self._pending)
        scalars, bands = iter(numbers[:bands_start]), iter(numbers[bands_start:])
        records = []
        for step in self._pending:
            record = {**step.facts, **{name: next(scalars) for name in step.scalars}}
            loss = record["loss"]
            if math.isfinite(loss):
                self.average = loss if self.average is None else 0.98 * self.average + 0.02 * loss
            record["loss_average"] = self.average
            self.broken.see(record, [] if step.tally is None else step.tally.samples)
            if step.tally is not None:
                self._bands.add([next(bands) for _ in range(step.tally.bands.numel())])
            if record["step"] % self.every == 0 or record["step"] == self.last:
                record |= self._bands.take()
            records.append(record)
        self._pending.clear()
        return records

    def state_dict(self) -> dict[str, Any]:
        """Averages and counts that go on; pending steps must have been flushed."""
        assert not self._pending, "flush before saving"
        return {"average": self.average, "bands": self._bands.state_dict(), "broken": self.broken.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.average = state["average"]
        if "bands" in state:  # older states have only the average
            self._bands.load_state_dict(state["bands"])
            self.broken.load_state_dict(state["broken"])


def peak_memory_gib() -> float:
    """Peak device memory since the start on CUDA, resident memory of the process on a CPU, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


class RunLog:
    """The JSONL file of a run, and the trackers that are told the same; written by the main process only.

    The JSONL file holds one object per optimizer step: `step`, `epoch`, `loss`, `loss_average`, `grad_norm`,
    `not_finite` (samples without usable latents), `skipped` (1 when the weights were left alone), `images` (of such a
    step only), `loss_band/<timesteps>` (of an interval's last step only) and `lr/<group>` are functions of the run
    alone; MACHINE_KEYS are not. On resume the records after the resumed step are cut off first, so that a step never
    appears twice.
    """

    def __init__(self, jsonl: Path, trackers: Sequence[Tracker] = (), *, resumed_step: int) -> None:
        self.jsonl = jsonl
        self.trackers = trackers
        jsonl.parent.mkdir(parents=True, exist_ok=True)
        self._noted = _cut_after(jsonl, resumed_step)
        self._file: IO[str] = jsonl.open("a", encoding="utf-8")
        self._started = time.time()

    def write(self, records: list[dict[str, Any]], **of_machine: float) -> None:
        """Append `records` (from `Meters.flush`) with what the machine made of them; trackers get that once."""
        elapsed = round(time.time() - self._started, 3)
        rounded = {name: round(value, 3) for name, value in of_machine.items()}
        for record in records:
            self._file.write(json.dumps({**record, "time": elapsed, **rounded}) + "\n")
            tell = {**record, **rounded} if record is records[-1] else record
            numbers = {name: value for name, value in tell.items() if isinstance(value, int | float)}
            self._tell(numbers, record["step"])
        self._file.flush()

    def note(self, record: dict[str, Any]) -> None:
        """Append a record beside the per-step ones: `step`, `epoch`, and numbers whose names hold a "/".

        After a resume one that is there already, of an epoch that ended after the state was saved, is left as it is.
        """
        if record["step"] not in self._noted:
            self._file.write(json.dumps({**record, "time": round(time.time() - self._started, 3)}) + "\n")
            self._file.flush()
        self._tell({name: value for name, value in record.items() if "/" in name}, record["step"])

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number outside the per-step records, for the trackers."""
        self._tell({name: value}, step)

    def _tell(self, numbers: Mapping[str, float], step: int) -> None:
        named = {n if "/" in n else f"train/{n}": v for n, v in numbers.items() if n not in ("step", "epoch")}
        for tracker in self.trackers:
            tracker.numbers(named, step)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        for tracker in self.trackers:
            tracker.close()


def _cut_after(jsonl: Path, step: int) -> set[int]:
    """Drop records with a step beyond `step`, and a torn last line, from an earlier run's file.

    Returns the steps of the records that stay and are not of a step itself (from `RunLog.note`).
    """
    kept: list[str] = []
    noted: set[int] = set()
    if not jsonl.exists():
        return noted
    for line in jsonl.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            if record["step"] > step:
                break
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        kept.append(line)
        if "loss" not in record:
            noted.add(record["step"])
    jsonl.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return noted
