"""The hook that writes checkpoints and states, and removes old ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.log import get_logger
from library.training import naming
from library.training.hooks import Event, View
from library.training.requests import SAVE

log = get_logger(__name__)


@dataclass
class SaveHook:
    """Checkpoints and states by epoch, by step, on request, on a stop and at the end, with the keep rules of `naming`.

    save_model(path, view) and save_state(path) do the writing, on every rank, and return what went wrong after all
    attempts (None: nothing, and on ranks that do not write). A failure on the way is reported and training goes on; one
    at the end makes the run a failed one. flush(view) empties the meters first, so that a state holds no pending step.
    Old files are removed by the main process, once the new ones are there.
    """

    names: naming.Names
    settings: Any
    save_model: Callable[[Path, View], UserError | None]
    save_state: Callable[[Path], UserError | None]
    flush: Callable[[View], None]
    is_main: bool = True
    _overdue: list[Path] = field(default_factory=list)

    def __call__(self, event: Event, view: View) -> None:
        if event is Event.STEP:
            self._after_step(view)
        elif event is Event.EPOCH:
            self._after_epoch(view)
        elif event is Event.END:
            self._at_end(view)

    def _after_step(self, view: View) -> None:
        s, step = self.settings, view.progress.global_step
        if step >= view.total_steps:
            return
        if naming.step_is_saved(step, s.save_every_n_steps):
            with_state = s.save_state or SAVE in view.requested
            saved = self._checkpoint(self.names.step_stem(step), view, with_state=with_state)
            self._forget_steps(step, saved=saved)
        elif SAVE in view.requested and not view.stop:
            self._checkpoint(self.names.step_stem(step), view, with_state=True)

    def _after_epoch(self, view: View) -> None:
        s, epoch = self.settings, view.progress.epoch
        if naming.epoch_is_saved(epoch, s.save_every_n_epochs, view.num_epochs):
            saved = self._checkpoint(self.names.epoch_stem(epoch), view, with_state=s.save_state)
            self._forget_epochs(epoch, saved=saved)

    def _at_end(self, view: View) -> None:
        s, progress = self.settings, view.progress
        if view.stop and progress.global_step < view.total_steps:
            stem = self.names.step_stem(progress.global_step)
            if self._checkpoint(stem, view, with_state=True, is_last=True):
                log.warning(f"{view.stop_reason}; continue with --resume {self.names.state(stem)}")
        else:
            with_state = s.save_state or s.save_state_on_train_end
            self._checkpoint(self.names.last_stem(), view, with_state=with_state, is_last=True)

    def _checkpoint(self, stem: str, view: View, *, with_state: bool, is_last: bool = False) -> bool:
        """Write model and state; whether this process could, so that older ones may go."""
        self.flush(view)
        with view.clock.pause():
            failures = [self.save_model(self.names.model(stem), view)]
            if with_state:
                failures.append(self.save_state(self.names.state(stem)))
        failed = [failure for failure in failures if failure is not None]
        for failure in failed:
            log.warning(str(failure) if is_last else f"{failure}\ntraining goes on; older files are kept")
        if failed and is_last:
            reasons = failed if view.failure is None else [*failed, view.failure]
            view.failure = UserError.from_problems(problem for each in reasons for problem in each.problems)
        return not failed

    def _forget_steps(self, step: int, *, saved: bool) -> None:
        s = self.settings
        model = naming.step_to_remove(step, s.save_every_n_steps, s.save_last_n_steps)
        state = naming.step_to_remove(step, s.save_every_n_steps, s.save_last_n_steps_state or s.save_last_n_steps)
        self._forget(
            None if model is None else self.names.step_stem(model),
            None if state is None else self.names.step_stem(state),
            saved=saved,
        )

    def _forget_epochs(self, epoch: int, *, saved: bool) -> None:
        s = self.settings
        model = naming.epoch_to_remove(epoch, s.save_every_n_epochs, s.save_last_n_epochs)
        state = naming.epoch_to_remove(epoch, s.save_every_n_epochs, s.save_last_n_epochs_state or s.save_last_n_epochs)
        self._forget(
            None if model is None else self.names.epoch_stem(model),
            None if state is None else self.names.epoch_stem(state),
            saved=saved,
        )

    def _forget(self, model_stem: str | None, state_stem: str | None, *, saved: bool) -> None:
        """Let old files go; after a save that failed they stay until one succeeds."""
        if not self.is_main:
            return
        if model_stem is not None:
            model = self.names.model(model_stem)
            models = (model, self.names.ema_beside(model))
            self._overdue += [*models, *map(naming.tokens_beside, models)]
        self._overdue += [] if state_stem is None else [self.names.state(state_stem)]
        if not saved:
            return
        for path in self._overdue:
            if path.is_dir():  # a state, or a model in the diffusers layout
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self._overdue.clear()
