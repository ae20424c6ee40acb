"""Numbers of a run: kept on the device between logging intervals, then written to JSONL, TensorBoard and the bar."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch import Tensor


@dataclass
class Meters:
    """Collects per-step tensors and turns a whole interval into Python numbers with one transfer.

    average: exponential moving average of the loss (decay 0.98, started at the first loss): the curve people read.
    """

    average: float | None = None
    _pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = field(default_factory=list)

    def update(self, facts: dict[str, Any], scalars: Mapping[str, Tensor]) -> None:
        """Keep one step: `facts` are host values, `scalars` 0-d tensors that are not read yet."""
        self._pending.append((facts, {name: value.detach().float() for name, value in scalars.items()}))

    def flush(self) -> list[dict[str, Any]]:
        """One record per kept step, oldest first, with `loss_average` added; reads the device once."""
        if not self._pending:
            return []
        flat = [value.reshape(()) for _, scalars in self._pending for value in scalars.values()]
        numbers = iter(torch.stack(flat).tolist())
        records = []
        for facts, scalars in self._pending:
            record = {**facts, **{name: next(numbers) for name in scalars}}
            loss = record["loss"]
            if loss == loss:
                self.average = loss if self.average is None else 0.98 * self.average + 0.02 * loss
            record["loss_average"] = self.average
            records.append(record)
        self._pending.clear()
        return records

    def state_dict(self) -> dict[str, Any]:
        """The moving average; pending steps must have been flushed."""
        assert not self._pending, "flush before saving"
        return {"average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the moving average."""
        self.average = state["average"]


def memory_text() -> str:
    """Peak device memory on CUDA, resident memory of the process on a CPU, in GiB."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}GiB"
    return f"{psutil.Process().memory_info().rss / 2**30:.1f}GiB"


class RunLog:
    """The JSONL file and the TensorBoard folder of a run, written by the main process only.

    The JSONL file holds one object per optimizer step: `step`, `epoch`, `loss`, `loss_average`, `grad_norm`,
    `not_finite` (samples without usable latents) and `lr/<group>` are functions of the run alone; `time` (seconds since
    the start) and `images_per_second` depend on the machine. On resume the records after the resumed step are cut off
    first, so that a step never appears twice.
    """

    def __init__(self, jsonl: Path, tensorboard_dir: Path, *, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.jsonl = jsonl
        jsonl.parent.mkdir(parents=True, exist_ok=True)
        _cut_after(jsonl, resumed_step)
        self._file: IO[str] = jsonl.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(tensorboard_dir))
        self._started = time.time()

    def write(self, records: list[dict[str, Any]], *, images_per_second: float) -> None:
        """Append `records` (from `Meters.flush`)."""
        elapsed = round(time.time() - self._started, 3)
        for record in records:
            line = {**record, "time": elapsed, "images_per_second": round(images_per_second, 3)}
            self._file.write(json.dumps(line) + "\n")
            for name, value in record.items():
                if name not in ("step", "epoch") and isinstance(value, int | float):
                    self._writer.add_scalar(name if "/" in name else f"train/{name}", value, record["step"])
        self._file.flush()

    def note(self, record: dict[str, Any]) -> None:
        """Append a record beside the per-step ones: `step`, `epoch`, and numbers whose names hold a "/"."""
        self._file.write(json.dumps({**record, "time": round(time.time() - self._started, 3)}) + "\n")
        self._file.flush()
        for name, value in record.items():
            if "/" in name:
                self._writer.add_scalar(name, value, record["step"])

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number outside the per-step records."""
        self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._writer.close()


def _cut_after(jsonl: Path, step: int) -> None:
    """Drop records with a step beyond `step`, and a torn last line, from an earlier run's file."""
    if not jsonl.exists():
        return
    kept = []
    for line in jsonl.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        kept.append(line)
    jsonl.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
