"""Saving: when, in which order, and what happens when the disk says no."""

import errno
import os
import types
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.io.safetensors_file import save
from library.training import saving
from library.training.hooks import Event, View
from library.training.metrics import Meters
from library.training.naming import Names
from library.training.requests import SAVE
from library.training.save_hook import SaveHook
from library.training.saving import Attempts
from library.training.state import Progress

SETTINGS = {
    "save_every_n_steps": None,
    "save_every_n_epochs": None,
    "save_last_n_steps": None,
    "save_last_n_steps_state": None,
    "save_last_n_epochs": None,
    "save_last_n_epochs_state": None,
    "save_state": False,
    "save_state_on_train_end": False,
}


@pytest.fixture
def slept(monkeypatch):
    """The pauses between attempts, which take no time here."""
    pauses = []
    monkeypatch.setattr(saving.time, "sleep", pauses.append)
    return pauses


class _Run:
    """A save hook over real files, and the calls it made."""

    def __init__(self, folder, total=100, **settings):
        self.folder, self.calls, self.seen = folder, [], {}
        self.view = View(Progress(), total, 10, Meters())
        self.hook = SaveHook(
            Names(folder, "m"),
            types.SimpleNamespace(**{**SETTINGS, **settings}),
            save_model=self._model,
            save_state=self._state,
            flush=lambda view: self.calls.append("flush"),
        )

    def _model(self, path, view):
        self.calls.append(path.name)
        self.seen[path.name] = sorted(each.name for each in self.folder.iterdir())
        return Attempts()(path, lambda: save({"w": torch.ones(3)}, path, checked=True))

    def _state(self, path):
        self.calls.append(path.name)
        return Attempts()(path, lambda: path.mkdir(exist_ok=True))

    def step(self, number, requested=()):
        self.view.progress.global_step = number
        self.view.requested = frozenset(requested)
        self.hook(Event.STEP, self.view)

    def files(self):
        return sorted(each.name for each in self.folder.iterdir())


def test_the_old_file_goes_after_the_new_one_is_there(tmp_path):
    run = _Run(tmp_path, save_every_n_steps=10, save_last_n_steps=10)
    for step in range(1, 41):
        run.step(step)
    assert run.files() == ["m-step00000030.safetensors", "m-step00000040.safetensors"]
    # While a file is written, all that the rule keeps and the one it will remove are there.
    assert run.seen["m-step00000040.safetensors"] == ["m-step00000020.safetensors", "m-step00000030.safetensors"]
    assert run.calls[:2] == ["flush", "m-step00000010.safetensors"]


def test_states_have_a_keep_rule_of_their_own(tmp_path):
    settings = {"save_last_n_epochs": 3, "save_last_n_epochs_state": 1, "save_state": True}
    run = _Run(tmp_path, save_every_n_epochs=1, **settings)
    for epoch in range(1, 6):
        run.view.progress.epoch = epoch
        run.hook(Event.EPOCH, run.view)
    models = [f"m-00000{epoch}.safetensors" for epoch in (3, 4, 5)]
    assert run.files() == sorted([*models, "m-000005-state"])


def test_a_request_saves_model_and_state_like_a_step(tmp_path):
    run = _Run(tmp_path, save_every_n_steps=10)
    run.step(9)
    run.step(10, requested=[SAVE])
    run.step(11, requested=[SAVE])
    assert run.files() == [
        "m-step00000010-state", "m-step00000010.safetensors", "m-step00000011-state", "m-step00000011.safetensors",
    ]  # fmt: skip


def _fail(monkeypatch, times):
    """The next `times` renames find the disk full."""
    left = [times]
    real = os.replace

    def replace(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr("library.io.atomic.os.replace", replace)


def test_a_save_that_works_the_second_time_is_a_save(tmp_path, slept, monkeypatch, caplog):
    _fail(monkeypatch, 2)
    run = _Run(tmp_path, save_every_n_steps=10)
    run.step(10)
    assert run.files() == ["m-step00000010.safetensors"]
    assert slept == [1.0, 5.0]
    assert "no space left on the disk while writing); try 2 in 1 s" in caplog.text


def test_training_goes_on_after_a_save_that_failed_and_nothing_old_is_removed_for_it(
    tmp_path, slept, monkeypatch, caplog
):
    run = _Run(tmp_path, save_every_n_steps=10, save_last_n_steps=10)
    for step in (10, 20):
        run.step(step)
    _fail(monkeypatch, 4)
    run.step(30)
    assert run.files() == ["m-step00000010.safetensors", "m-step00000020.safetensors"]
    assert "after 4 tries: no space left" in caplog.text and "training goes on" in caplog.text
    assert "free some space" in caplog.text and not run.view.stop and run.view.failure is None
    run.step(40)
    assert run.files() == ["m-step00000040.safetensors"], "what was to go goes with the next save"


def test_the_last_save_makes_the_run_a_failed_one(tmp_path, slept, monkeypatch):
    run = _Run(tmp_path, save_state=True)
    _fail(monkeypatch, 99)
    run.view.progress.global_step = 100
    run.hook(Event.END, run.view)
    assert isinstance(run.view.failure, UserError)
    (problem,) = run.view.failure.problems
    assert "m.safetensors could not be saved after 4 tries" in problem.what and "free some space" in problem.fix
    assert run.files() == ["m-state"], "the state is tried all the same"


def test_what_torch_raises_on_a_full_disk_is_tried_again_too(slept):
    def write():
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    failure = Attempts((0.1,))(Path("state"), write)
    assert "state could not be saved after 2 tries: RuntimeError: [enforce fail" in failure.problems[0].what


def test_defects_of_our_own_are_not_tried_again(slept):
    def write():
        raise KeyError("x")

    with pytest.raises(KeyError):
        Attempts()(Path("state"), write)
    assert slept == []
