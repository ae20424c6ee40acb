"""The hook that writes checkpoints and states, and removes old ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.log import get_logger
from library.training import naming
from library.training.hooks import Event, View

log = get_logger(__name__)


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
            model = self.names.model(model_stem)
            for old in (model, self.names.ema_beside(model)):
                if old.is_dir():  # a diffusers folder
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.unlink(missing_ok=True)
        if state_stem is not None:
            shutil.rmtree(self.names.state(state_stem), ignore_errors=True)
