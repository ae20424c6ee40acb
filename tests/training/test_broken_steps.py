"""Steps that are not finite: counted, named, and the end of a run when nothing else comes."""

import math

import numpy as np
import pytest
import torch

from library.data.types import SampleKey
from library.training.broken_steps import SCALER_BACKOFFS, BrokenSteps, image_name
from library.training.hooks import Event, View
from library.training.metrics import Meters
from library.training.state import Progress
from library.training.stop_hooks import NonFiniteHook

KEYS = [SampleKey("a", 0), SampleKey("b", 1), SampleKey("b", 0)]


def _samples(*losses):
    return [(KEYS, torch.tensor(losses))]


def _record(step=1, **values):
    return {"step": step, "loss": 0.5, "grad_norm": 1.0, "skipped": 0.0, **values}


def test_a_loss_that_is_not_finite_names_the_images_it_comes_from():
    broken = BrokenSteps(name_of=lambda key: f"/data/{key}.png")
    record = _record(loss=math.nan, skipped=1.0)
    broken.see(record, _samples(0.5, math.nan, math.nan))
    assert record["images"] == ["/data/b.png"]
    assert "step 1 (loss; images: /data/b.png)" in broken.report()
    assert broken.report() == "", "told once"


@pytest.mark.parametrize("values", [{"grad_norm": math.inf}, {"skipped": 1.0}])
def test_a_gradient_that_is_not_finite_names_all_images_of_the_step(values):
    broken = BrokenSteps()
    record = _record(**values)
    broken.see(record, _samples(0.5, 0.6, 0.7))
    assert record["images"] == ["a", "b"] and broken.total == 1


def test_a_loss_that_is_not_finite_counts_even_where_its_gradient_is():
    broken = BrokenSteps()
    broken.see(_record(loss=math.inf), [])
    assert (broken.total, broken.in_a_row) == (1, 1)


def test_only_steps_in_a_row_reach_the_limit():
    broken = BrokenSteps()
    for step in range(1, 10):
        broken.see(_record(step, skipped=float(step % 3 != 0)), [])
    assert broken.total == 6 and not broken.reaches(3)
    broken.see(_record(10, skipped=1.0), [])
    broken.see(_record(11, skipped=1.0), [])
    broken.see(_record(12, skipped=1.0), [])
    assert broken.reaches(3) and not broken.reaches(4)


def test_overflows_of_a_scaler_are_its_work_until_they_do_not_end():
    broken = BrokenSteps(has_scaler=True)
    for step in range(1, SCALER_BACKOFFS):
        record = _record(step, grad_norm=math.inf, skipped=1.0)
        broken.see(record, _samples(0.5, 0.5, 0.5))
        assert "images" not in record
    assert broken.report() == "" and broken.total == 0 and broken.overflows == SCALER_BACKOFFS - 1
    assert not broken.reaches(3)
    broken.see(_record(loss=math.nan, skipped=1.0), _samples(math.nan, 0.5, 0.5))
    assert broken.total == 1, "a scaler does not make a loss NaN"
    assert broken.reaches(3)


def test_the_report_stays_short():
    broken = BrokenSteps()
    for step in range(1, 101):
        broken.see(_record(step, skipped=1.0), [([SampleKey(f"i{n}", 0) for n in range(50)], torch.zeros(50))])
    told = broken.report()
    assert told.startswith("100 steps had") and "and 95 more" in told and "and 42 more" in told and len(told) < 900


def test_a_resume_keeps_the_count_and_starts_a_new_row():
    broken = BrokenSteps()
    broken.see(_record(skipped=1.0), [])
    again = BrokenSteps()
    again.load_state_dict(broken.state_dict())
    assert (again.total, again.in_a_row) == (1, 0)


class _Texts(list):
    def text(self, index):
        return self[index]


class _Table:
    images = np.array([0, 2])
    keys = _Texts(["a", "gone", "b"])
    paths = _Texts(["/x/a.png", "/x/gone.png", "/x/b.png"])


def test_keys_become_paths():
    assert image_name(_Table(), "b") == "/x/b.png"
    assert image_name(_Table(), "gone") == "gone"


def _view(in_a_row=5):
    view = View(Progress(global_step=30), 100, 1, Meters())
    view.meters.broken.in_a_row = in_a_row
    return view


def test_the_hook_ends_the_run_as_a_failed_one():
    view = _view()
    NonFiniteHook(6)(Event.STEP, view)
    assert not view.stop
    NonFiniteHook(5)(Event.STEP, view)
    assert view.stop and "last 5 steps" in view.stop_reason
    assert "lower learning rate" in view.failure.problems[0].fix
    assert view.failure.problems[0].where == "step 30"


def test_no_limit_never_ends_a_run():
    view = _view(in_a_row=10**6)
    NonFiniteHook(0)(Event.STEP, view)
    assert not view.stop and view.failure is None
