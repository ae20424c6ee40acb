"""Hooks that write the numbers of a run: progress bar, JSONL, TensorBoard."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from library.log import Console, get_logger
from library.training.hooks import Event, View
from library.training.metrics import RunLog, memory_text

log = get_logger(__name__)


@dataclass
class LogHook:
    """Progress bar, JSONL and TensorBoard; only the main process has one."""

    run_log: RunLog
    every: int
    show_bar: bool = True
    _bar: Any = None
    _around_bar: ExitStack = field(default_factory=ExitStack)
    _last_time: float = 0.0
    _last_samples: int = 0

    def __call__(self, event: Event, view: View) -> None:
        progress = view.progress
        if event is Event.START:
            self._last_time, self._last_samples = time.perf_counter(), progress.samples
            # Log lines go above the bar instead of through it.
            self._around_bar.enter_context(logging_redirect_tqdm())
            self._bar = tqdm(
                total=view.total_steps,
                initial=progress.global_step,
                desc="steps",
                smoothing=0.05,
                mininterval=0.2 if sys.stderr.isatty() else 10,
                dynamic_ncols=True,
                disable=not self.show_bar,
                file=Console(),
            )
        elif event is Event.STEP:
            self._bar.update(1)
            if progress.global_step % self.every == 0 or progress.global_step == view.total_steps or view.stop:
                self.flush(view)
        elif event is Event.END:
            self.flush(view)
            self._bar.close()
            self._around_bar.close()
            self.run_log.close()

    def flush(self, view: View) -> None:
        """Write everything collected so far."""
        records = view.meters.flush()
        if not records:
            return
        now = time.perf_counter()
        speed = (view.progress.samples - self._last_samples) / max(now - self._last_time, 1e-9)
        self._last_time, self._last_samples = now, view.progress.samples
        self.run_log.write(records, images_per_second=speed)
        broken = int(sum(record["not_finite"] for record in records))
        if broken:
            log.warning(
                f"{broken} samples of the last {len(records)} steps came out of the VAE as NaN and did not count; "
                "--cache_latents names such images"
            )
        text = f"loss {view.meters.average or float('nan'):.4f}, {speed:.2f} img/s, {memory_text()}, "
        text += f"epoch {view.progress.epoch + 1}/{view.num_epochs}"
        self._bar.set_postfix_str(text)

    def note(self, view: View, record: dict[str, Any]) -> None:
        """Write a record beside those of the steps, after all of these."""
        self.flush(view)
        self.run_log.note(record)


@dataclass
class DrainHook:
    """Empties the meters of processes that write no log."""

    every: int

    def __call__(self, event: Event, view: View) -> None:
        if event is Event.STEP and view.progress.global_step % self.every == 0:
            self.flush(view)

    def flush(self, view: View) -> None:
        """Forget everything collected so far."""
        view.meters.flush()

    def note(self, view: View, record: dict[str, Any]) -> None:
        """Nothing: the main process writes it."""
        self.flush(view)
