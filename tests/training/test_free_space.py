"""What a run plans to save, against what is free."""

import shutil
import types
from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.errors import UserError
from library.training import free_space, naming
from library.training.free_space import Planned, planned
from library.training.optim import build_optimizer
from tests.training.test_save_hook import SETTINGS


def _plan(total_steps=100, num_epochs=10, **settings):
    chosen = types.SimpleNamespace(**{**SETTINGS, **settings})
    return planned(chosen, total_steps=total_steps, num_epochs=num_epochs)


def test_worked_examples():
    assert _plan() == Planned(1, 0)
    assert _plan(save_state_on_train_end=True) == Planned(1, 1)
    assert _plan(save_every_n_epochs=2, save_state=True) == Planned(5, 5), "4 epochs before the last, and the end"
    # Every 10 steps, the last 30 kept: 4 stay, a fifth is there while the next is written; and the end.
    assert _plan(save_every_n_steps=10, save_last_n_steps=30, total_steps=1000) == Planned(6, 0)
    settings = {"save_every_n_steps": 10, "save_last_n_steps": 30, "save_last_n_steps_state": 10, "save_state": True}
    assert _plan(**settings, total_steps=1000) == Planned(6, 4)


@given(
    every=st.integers(1, 12),
    keep=st.none() | st.integers(1, 40),
    total=st.integers(1, 120),
    period=st.none() | st.integers(1, 4),
    keep_epochs=st.none() | st.integers(1, 5),
    epochs=st.integers(1, 12),
)
def test_the_plan_is_what_following_every_step_finds(every, keep, total, period, keep_epochs, epochs):
    def most(moments, step, kept, to_remove):
        files, highest = set(), 0
        for moment in moments:
            files.add(moment)
            highest = max(highest, len(files))
            files.discard(to_remove(moment, step, kept))
        return highest

    by_step = most(range(every, total, every), every, keep, naming.step_to_remove)
    by_epoch = most(range(period, epochs, period), period, keep_epochs, naming.epoch_to_remove) if period else 0
    found = _plan(
        total_steps=total,
        num_epochs=epochs,
        save_every_n_steps=every,
        save_last_n_steps=keep,
        save_every_n_epochs=period,
        save_last_n_epochs=keep_epochs,
    )
    assert found.models == by_step + by_epoch + 1


@pytest.mark.parametrize(
    ("name", "low", "high"), [("AdamW", 8, 8.01), ("AdamW8bit", 2, 2.2), ("Lion", 4, 4.01), ("SGDNesterov", 4, 4.01)]
)
def test_optimizer_state_is_measured(name, low, high):
    def make(params):
        groups = [{"name": "trial", "params": params, "lr": 1e-4}]
        return build_optimizer(groups, optimizer_type=name, learning_rate=1e-4, arguments={})

    try:
        make([torch.nn.Parameter(torch.zeros(2))])
    except (UserError, KeyError):
        pytest.skip(f"{name} is not in the table")
    assert low <= free_space.optimizer_bytes(make) <= high


def test_an_optimizer_that_cannot_step_here_counts_as_adam():
    def make(params):
        raise RuntimeError("needs CUDA")

    assert free_space.optimizer_bytes(make) == 8


def test_bytes_of_weights_and_of_nested_states():
    tensors = [torch.zeros(10), torch.zeros(3, 4, dtype=torch.bfloat16)]
    assert free_space.weight_bytes(tensors, None) == 40 + 24
    assert free_space.weight_bytes(tensors, torch.float16) == 44
    assert free_space.tensor_bytes({"a": tensors, "b": {"c": torch.zeros(2, dtype=torch.uint8)}, "d": 3}) == 66


@pytest.fixture
def free(monkeypatch):
    """free(number) sets the free bytes of every disk."""
    usage = namedtuple("usage", "total used free")
    return lambda number: monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(number * 2, number, number))


def test_a_run_whose_model_does_not_fit_is_refused(tmp_path, free):
    free(6 * 2**30)
    with pytest.raises(UserError) as caught:
        free_space.check(tmp_path, Planned(3, 0), model_bytes=7 * 2**30, state_bytes=0)
    assert "one model takes about 7.00 GiB, and 6.00 GiB are free" in caught.value.problems[0].what


def test_a_plan_that_does_not_fit_is_told_with_numbers(tmp_path, free, caplog):
    free(20 * 2**30)
    free_space.check(tmp_path, Planned(2, 1), model_bytes=7 * 2**30, state_bytes=5 * 2**30)
    assert caplog.text == ""
    free_space.check(tmp_path, Planned(2, 2), model_bytes=7 * 2**30, state_bytes=5 * 2**30)
    assert "need about 24.00 GiB at once: 2 of 7.00 GiB (models) and 2 of 5.00 GiB (states)" in caplog.text
