"""Meters and the run's log file."""

import json
import math

import pytest
import torch

from library.training.metrics import Meters, RunLog


def _records(meters, losses, first=1):
    for number, loss in enumerate(losses, first):
        meters.update({"step": number, "epoch": 1}, {"loss": torch.tensor(loss)})
    return meters.flush()


def test_the_average_does_not_depend_on_when_it_is_flushed():
    losses = [1.0, 2.0, 0.5, 4.0, 3.0]
    together = _records(Meters(), losses)
    meters = Meters()
    apart = _records(meters, losses[:2]) + _records(meters, losses[2:], 3)
    assert together == apart
    assert together[0]["loss_average"] == 1.0
    assert together[1]["loss_average"] == 0.98 * 1.0 + 0.02 * 2.0


def test_state_restores_the_average():
    meters = Meters()
    _records(meters, [1.0, 5.0])
    other = Meters()
    other.load_state_dict(meters.state_dict())
    assert _records(other, [3.0], 3) == _records(meters, [3.0], 3)


def test_a_resumed_log_has_every_step_once_and_survives_a_torn_line(tmp_path):
    path = tmp_path / "run-log.jsonl"
    log = RunLog(path, [], resumed_step=0)
    log.write(_records(Meters(), [1.0, 2.0, 3.0, 4.0]), images_per_second=1.0)
    log.close()
    path.write_text(path.read_text() + '{"step": 5, "lo')
    log = RunLog(path, [], resumed_step=2)
    log.write(_records(Meters(), [9.0], 3), images_per_second=1.0)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 9.0)]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_recorded_but_does_not_poison_the_average(broken):
    records = _records(Meters(), [1.0, broken, 1.0])
    assert not math.isfinite(records[1]["loss"])
    assert records[2]["loss_average"] == 1.0


def test_notes_stand_behind_their_step_and_are_not_repeated_after_a_resume(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, [], resumed_step=0)
    for step in (1, 2):
        log.write([{"step": step, "epoch": 1, "loss": 0.5}])
        log.note({"step": step, "epoch": 1, "loss/validation/gap": step / 8})
    log.close()
    log = RunLog(path, [], resumed_step=1)
    log.note({"step": 1, "epoch": 1, "loss/validation/gap": 0.125})
    log.write([{"step": 2, "epoch": 1, "loss": 0.5}])
    log.note({"step": 2, "epoch": 1, "loss/validation/gap": 0.25})
    log.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["step"], "loss" in record) for record in records] == [(1, True), (1, False), (2, True), (2, False)]
    assert [record["loss/validation/gap"] for record in records[1::2]] == [0.125, 0.25]
