"""What happens around the steps: each hook is one small object that the loop knows only by its event."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from library.log import Console, get_logger
from library.training import naming
from library.training.metrics import Meters, RunLog, memory_text
from library.training.state import Progress

log = get_logger(__name__)


class Event(Enum):
    """START before the first step, STEP after each optimizer step, EPOCH after each complete epoch, END at the end."""

    START = auto()
    STEP = auto()
    EPOCH = auto()
    END = auto()


@dataclass
class View:
    """What hooks see of a run. `request_stop` ends the loop after the running step."""

    progress: Progress
    total_steps: int
    num_epochs: int
    meters: Meters
    stop: bool = False
    stop_reason: str = ""

    def request_stop(self, reason: str) -> None:
        """End the run after this step, for `reason`."""
        self.stop, self.stop_reason = True, reason


class Hook(Protocol):
    """Called at every event, on every rank."""

    def __call__(self, event: Event, view: View) -> None: ...


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


@dataclass
class SaveHook:
    """Checkpoints and states by epoch, by step, on a stop and at the end, with the keep rules of `naming`.

    save_model(path, view) and save_state(path) do the writing, on every rank; flush(view) empties the meters first, so
    that a state holds no pending step. Old files are removed by the main process.
    """

    names: naming.Names
    settings: Any
    save_model: Callable[[Path, View], None]
    save_state: Callable[[Path], None]
    flush: Callable[[View], None]
    is_main: bool = True

    def __call__(self, event: Event, view: View) -> None:
        s, progress = self.settings, view.progress
        if event is Event.STEP and naming.step_is_saved(progress.global_step, s.save_every_n_steps):
            if progress.global_step < view.total_steps:
                self._checkpoint(self.names.step_stem(progress.global_step), view, with_state=s.save_state)
                self._forget_steps(progress.global_step)
        elif event is Event.EPOCH and naming.epoch_is_saved(progress.epoch, s.save_every_n_epochs, view.num_epochs):
            self._checkpoint(self.names.epoch_stem(progress.epoch), view, with_state=s.save_state)
            self._forget_epochs(progress.epoch)
        elif event is Event.END:
            if view.stop and progress.global_step < view.total_steps:
                stem = self.names.step_stem(progress.global_step)
                self._checkpoint(stem, view, with_state=True)
                log.warning(f"{view.stop_reason}; continue with --resume {self.names.state(stem)}")
            else:
                self._checkpoint(self.names.last_stem(), view, with_state=s.save_state or s.save_state_on_train_end)

    def _checkpoint(self, stem: str, view: View, *, with_state: bool) -> None:
        self.flush(view)
        self.save_model(self.names.model(stem), view)
        if with_state:
            self.save_state(self.names.state(stem))

    def _forget_steps(self, step: int) -> None:
        s = self.settings
        model = naming.step_to_remove(step, s.save_every_n_steps, s.save_last_n_steps)
        state = naming.step_to_remove(step, s.save_every_n_steps, s.save_last_n_steps_state or s.save_last_n_steps)
        self._remove(
            None if model is None else self.names.step_stem(model),
            None if state is None else self.names.step_stem(state),
        )

    def _forget_epochs(self, epoch: int) -> None:
        s = self.settings
        model = naming.epoch_to_remove(epoch, s.save_every_n_epochs, s.save_last_n_epochs)
        state = naming.epoch_to_remove(epoch, s.save_every_n_epochs, s.save_last_n_epochs_state or s.save_last_n_epochs)
        self._remove(
            None if model is None else self.names.epoch_stem(model),
            None if state is None else self.names.epoch_stem(state),
        )

    def _remove(self, model_stem: str | None, state_stem: str | None) -> None:
        if not self.is_main:
            return
        if model_stem is not None:
            self.names.model(model_stem).unlink(missing_ok=True)
        if state_stem is not None:
            shutil.rmtree(self.names.state(state_stem), ignore_errors=True)


@dataclass
class StopHook:
    """Turns the first Ctrl-C or SIGTERM into a stop after the running step; a second Ctrl-C ends the process at once.

    agree: makes all ranks see the same answer, after every step: a signal can reach them in different ones, and
    launchers kill workers that do not end within 30 seconds. None with one process.
    """

    agree: Callable[[bool], bool] | None = None
    _seen: str = ""
    _previous: dict[int, Any] = field(default_factory=dict)

    def __call__(self, event: Event, view: View) -> None:
        if event is Event.START:
            for number in (signal.SIGINT, signal.SIGTERM):
                try:
                    self._previous[number] = signal.signal(number, self._on_signal)
                except ValueError:  # not the main thread: whoever runs us there handles signals
                    return
        elif event is Event.STEP:
            seen = bool(self._seen)
            if self.agree(seen) if self.agree is not None else seen:
                view.request_stop(
                    f"stopped by {self._seen or 'another process'} after step {view.progress.global_step}"
                )
        elif event is Event.END:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._seen = signal.Signals(number).name
        words = "finishing this step, then saving (Ctrl-C again to quit without saving)"
        tqdm.write(f"{self._seen}: {words}", file=Console())


@dataclass
class NonFiniteHook:
    """Reports skipped steps at the logging interval, and ends a run in which nothing else happens any more."""

    skipped: Callable[[], torch.Tensor]
    every: int
    limit: int = 50
    _reported: int = 0
    _last_report_step: int = 0

    def __call__(self, event: Event, view: View) -> None:
        if event not in (Event.STEP, Event.END) or (event is Event.STEP and view.progress.global_step % self.every):
            return
        count = int(self.skipped().item())
        new, self._reported = count - self._reported, count
        steps, self._last_report_step = view.progress.global_step - self._last_report_step, view.progress.global_step
        if new:
            log.warning(f"{new} of the last {steps} steps had a gradient that is not finite and were skipped")
        if new and new == steps and count >= self.limit:
            view.request_stop("every step has a gradient that is not finite: lower the learning rate or use bf16")
