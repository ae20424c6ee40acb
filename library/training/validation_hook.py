"""When the validation loss is measured, and what is said about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from library.log import Console, get_logger
from library.training.hooks import Event, View
from library.training.validation import HELD_OUT, TRAINED, Means, Validation

log = get_logger(__name__)

BAR_DELAY = 2.0  # seconds before a progress bar shows: shorter work needs none


@dataclass
class ValidationHook:
    """Measures at the moments that the settings name and, once more, at the end of a run that was not stopped.

    scope: the state in which the run is judged. note(view, record) writes to the log, on the main process.
    """

    validation: Validation
    settings: Any
    scope: Callable[[], AbstractContextManager]
    note: Callable[[View, dict[str, Any]], None]
    _last: int | None = None
    _began_at: int = 0

    def __call__(self, event: Event, view: View) -> None:
        if self._is_due(event, view) and self._last != view.progress.global_step:
            self._last = view.progress.global_step
            self._measure(view)

    def _is_due(self, event: Event, view: View) -> bool:
        """sd-scripts' rules: the end of every epoch unless a period is given, and periods of steps besides."""
        progress, s = view.progress, self.settings
        if event is Event.START:
            self._began_at = progress.global_step
            if progress.global_step and self._is_at_period(progress.global_step):
                self._last = progress.global_step  # measured before the state was saved
            return s.validate_at_first and progress.global_step == 0
        if event is Event.STEP:
            return self._is_at_period(progress.global_step)
        if event is Event.EPOCH:
            return progress.epoch % (s.validate_every_n_epochs or 1) == 0
        return not view.stop and progress.global_step > self._began_at

    def _is_at_period(self, step: int) -> bool:
        every = self.settings.validate_every_n_steps
        return bool(every) and step % every == 0

    def _measure(self, view: View) -> None:
        began = time.perf_counter()
        is_quiet = not self.validation.accelerator.is_main_process
        with tqdm(
            total=self.validation.num_batches, desc="validation", unit="batch", delay=BAR_DELAY, leave=False,
            disable=is_quiet or None, file=Console(),
        ) as bar:  # fmt: skip
            found = self.validation.measure(self.scope, bar.update)
        progress = view.progress
        epoch = progress.epoch if progress.step_in_epoch == 0 else progress.epoch + 1
        self.note(view, {"step": progress.global_step, "epoch": epoch, **self._numbers(found)})
        held_out, trained = found[HELD_OUT], found[TRAINED]
        log.info(
            f"validation loss at step {progress.global_step}: {held_out.mean:.4f} on {held_out.images} held out, "
            f"{trained.mean:.4f} on {trained.images} training images, gap {held_out.mean - trained.mean:+.4f} "
            f"({len(self.validation.grid)} timesteps each, {time.perf_counter() - began:.1f} s)"
        )

    def _numbers(self, found: Mapping[str, Means]) -> dict[str, float]:
        """The record's numbers by name; a set without a single usable image has none."""
        numbers = {}
        for name, means in found.items():
            numbers[f"loss/validation/{name}"] = means.mean
            for band, mean in zip(self.validation.grid, means.bands, strict=True):
                numbers[f"loss/validation/{name}/t{band.low:03d}-{band.high:03d}"] = mean
        numbers["loss/validation/gap"] = found[HELD_OUT].mean - found[TRAINED].mean
        return {name: number for name, number in numbers.items() if not math.isnan(number)}
