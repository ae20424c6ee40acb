"""Hooks that end a run early: signals, and steps that are not finite."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from library.log import Console, get_logger
from library.training.hooks import Event, View

log = get_logger(__name__)


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
