"""Hooks that end a run early, or hear what a user asks of it: signals, request files, steps that are not finite."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from tqdm import tqdm

from library.errors import UserError
from library.log import Console, get_logger
from library.training import requests
from library.training.hooks import Event, View
from library.training.requests import RequestFiles

log = get_logger(__name__)


@dataclass
class StopHook:
    """Turns the first Ctrl-C or SIGTERM into a stop after the running step; a second Ctrl-C ends the process at once.

    The files of `requests` are heard at the same place: `view.requested` holds those that this step answers.
    agree: makes all ranks see the same answers, after every step: a signal can reach them in different ones, launchers
    kill workers that do not end within 30 seconds, and only the main process looks for files (`files`). It takes and
    returns one truth value per question, so that all of them cost one exchange. None with one process.
    has_prompts: whether there are sample pictures to ask for.
    """

    agree: Callable[[Sequence[bool]], Sequence[bool]] | None = None
    files: RequestFiles | None = None
    has_prompts: bool = True
    _seen: str = ""
    _previous: dict[int, Any] = field(default_factory=dict)

    def __call__(self, event: Event, view: View) -> None:
        if event is Event.START:
            self._start()
        elif event is Event.STEP:
            self._answered(view)
            self._ask(view)
        elif event is Event.END:
            self._answered(view)
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _start(self) -> None:
        left = self.files.forget() if self.files is not None else ()
        if left:
            log.warning(f"{', '.join(sorted(left))} of an earlier run in the output folder: removed, not obeyed")
        for number in (signal.SIGINT, signal.SIGTERM):
            # Outside of the main thread, whoever runs us there handles signals.
            with contextlib.suppress(ValueError):
                self._previous[number] = signal.signal(number, self._on_signal)

    def _ask(self, view: View) -> None:
        found = self.files.poll() if self.files is not None else frozenset()
        answers: Sequence[bool] = [bool(self._seen), *(name in found for name in requests.NAMES)]
        if self.agree is not None:
            answers = self.agree(answers)
        view.requested = frozenset(name for name, asked in zip(requests.NAMES, answers[1:], strict=True) if asked)
        step = view.progress.global_step
        if view.requested:
            log.info(f"{', '.join(sorted(view.requested))}: answered after step {step}")
        if requests.SAMPLE in view.requested and not self.has_prompts:
            log.warning(f"{requests.SAMPLE}: nothing is drawn, because --sample_prompts is not given")
        if answers[0]:
            view.request_stop(f"stopped by {self._seen or 'another process'} after step {step}")
        elif requests.STOP in view.requested:
            view.request_stop(f"stopped by {requests.STOP} after step {step}")

    def _answered(self, view: View) -> None:
        """The step that answered is over, with everything that it saved and drew."""
        if view.requested and self.files is not None:
            self.files.done(view.requested)
        view.requested = frozenset()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._seen = signal.Signals(number).name
        words = "finishing this step, then saving (Ctrl-C again to quit without saving)"
        tqdm.write(f"{self._seen}: {words}", file=Console())


@dataclass
class NonFiniteHook:
    """Reports steps that were not finite as they come off the device, and ends a run in which nothing else happens.

    limit: skipped steps in a row that end the run (`--max_nonfinite_steps`; 0: never), noticed at the next logging
    interval. The weights are those of the last good step, so the run ends like a stopped one, with model and state,
    and then with an error.
    """

    limit: int

    def __call__(self, event: Event, view: View) -> None:
        if event not in (Event.STEP, Event.END):
            return
        broken = view.meters.broken
        report = broken.report()
        if report:
            log.warning(report)
        goes_on = event is Event.STEP and not view.stop and view.progress.global_step < view.total_steps
        if goes_on and self.limit and broken.reaches(self.limit):
            what = f"the last {broken.in_a_row} steps had a loss or gradient that is not finite"
            view.request_stop(what)
            view.failure = UserError(
                f"{what}; the weights are those of the last good step and were saved with their state",
                where=f"step {view.progress.global_step}",
                fix="go on from an earlier state with a lower learning rate; use bf16 instead of fp16, --no_half_vae, "
                "--max_grad_norm 1, and look at the images named above (`images` in the log)",
            )
