"""Hooks that write the numbers of a run: progress bar, JSONL, trackers, and the curves at the end."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from library.log import Console, get_logger
from library.training.clock import Throughput
from library.training.hooks import Event, View
from library.training.metrics import RunLog, peak_memory_gib

log = get_logger(__name__)


@dataclass
class LogHook:
    """Progress bar, JSONL and trackers; only the main process has one. curves: the picture drawn at the end."""

    run_log: RunLog
    every: int
    curves: Path | None = None
    show_bar: bool = True
    _bar: Any = None
    _around_bar: ExitStack = field(default_factory=ExitStack)
    _throughput: Throughput | None = None

    def __call__(self, event: Event, view: View) -> None:
        progress = view.progress
        if event is Event.START:
            self._speed(view)
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
            if self.curves is not None:
                _draw(self.run_log.jsonl, self.curves)

    def _speed(self, view: View):
        if self._throughput is None:
            self._throughput = Throughput(view.clock)
        return self._throughput.mark(view.progress.global_step, view.progress.samples)

    def flush(self, view: View) -> None:
        """Write everything collected so far."""
        records = view.meters.flush()
        if not records:
            return
        speed, memory = self._speed(view), peak_memory_gib()
        self.run_log.write(records, **speed._asdict(), peak_memory_gib=memory)
        broken = int(sum(record["not_finite"] for record in records))
        if broken:
            log.warning(
                f"{broken} samples of the last {len(records)} steps came out of the VAE as NaN and did not count; "
                "--cache_latents names such images"
            )
        text = f"loss {view.meters.average or float('nan'):.4f}, {speed.images_per_second:.2f} img/s, {memory:.1f}GiB, "
        text += f"epoch {view.progress.epoch + 1}/{view.num_epochs}"
        if speed.data_wait > 0.1:
            text += f", {speed.data_wait:.0%} waiting for data"
        self._bar.set_postfix_str(text)

    def note(self, view: View, record: dict[str, Any]) -> None:
        """Write a record beside those of the steps, after all of these."""
        self.flush(view)
        self.run_log.note(record)


def _draw(jsonl: Path, picture: Path) -> None:
    """The curves as a picture, in which no run may fail; matplotlib takes a second to import."""
    from library.training.curves import draw_curves

    try:
        if draw_curves(jsonl, picture):
            log.info(f"curves of the run: {picture}")
    except Exception as error:  # drawing touches fonts, caches and the disk
        log.warning(f"no curves: {error}")


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
