"""The loss by timestep band, from the step's tensors to the log."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.data.types import Batch, SampleKey
from library.sizes import Size
from library.training.bands import NAMES, NUM_BANDS, BandTotals, band_sums
from library.training.metering import StepTally
from library.training.metrics import Meters
from library.training.step import StepOutput

SAMPLES = st.lists(st.tuples(st.floats(0, 8, width=32), st.integers(0, 999)), min_size=1, max_size=40)


@given(SAMPLES)
def test_band_sums_are_those_of_a_histogram(samples):
    losses, steps = (np.array(column) for column in zip(*samples, strict=True))
    edges = np.linspace(0, 1000, NUM_BANDS + 1)
    found = band_sums(torch.tensor(losses, dtype=torch.float32), torch.tensor(steps)).double().numpy()
    np.testing.assert_allclose(found[0], np.histogram(steps, edges, weights=losses)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[1], np.histogram(steps, edges)[0])


def test_edges_and_losses_that_are_not_finite():
    loss_B = torch.tensor([1.0, 2.0, math.nan, 4.0, math.inf])
    sums = band_sums(loss_B, torch.tensor([99, 100, 100, 999, 0]))
    assert sums[0].tolist() == [1.0, 2.0, *[0.0] * 7, 4.0]
    assert sums[1].tolist() == [1.0, 1.0, *[0.0] * 7, 1.0]


def test_names_say_the_timesteps():
    assert NAMES[0] == "loss_band/000-099" and NAMES[9] == "loss_band/900-999" and len(NAMES) == NUM_BANDS


def test_totals_forget_what_they_have_told():
    totals = BandTotals()
    totals.add([2.0, *[0.0] * 9, 1.0, *[0.0] * 9])
    totals.add([4.0, *[0.0] * 9, 2.0, *[0.0] * 9])
    assert totals.take() == {"loss_band/000-099": 2.0}
    assert totals.take() == {}


def _batch(records, num_real):
    keys = [SampleKey(record, 0) for record in records]
    return Batch(keys, num_real, torch.ones(len(keys)), [""] * len(keys), torch.zeros(len(keys), 6), Size(64, 64))


def _run(meters, steps, first=1):
    for number, (losses, timesteps) in enumerate(steps, first):
        loss_B = torch.tensor(losses)
        tally = StepTally(torch.device("cpu"), torch.zeros(()))
        out = StepOutput(loss_B[:-1].mean(), loss_B, torch.zeros(()))
        tally.add(_batch("abc", len(losses) - 1), torch.tensor(timesteps), out, share=1.0)
        meters.update({"step": number, "epoch": 1}, tally.scalars(torch.ones(()), torch.zeros(())), tally)
    return meters.flush()


STEPS = [([float(n), float(n + 1), 77.0], [10 * n, 500 + n, 999]) for n in range(1, 8)]


def test_the_last_record_of_an_interval_has_the_means_and_padding_does_not_count():
    records = _run(Meters(every=3, last=7), STEPS)
    banded = {record["step"]: {k: v for k, v in record.items() if k in NAMES} for record in records}
    assert {step for step, bands in banded.items() if bands} == {3, 6, 7}
    assert banded[3] == {"loss_band/000-099": 2.0, "loss_band/500-599": 3.0}
    assert banded[7] == {"loss_band/000-099": 7.0, "loss_band/500-599": 8.0}


def test_an_interval_that_is_cut_by_a_resume_is_the_same_interval():
    whole = _run(Meters(every=3, last=7), STEPS)
    first = Meters(every=3, last=7)
    head = _run(first, STEPS[:4])
    second = Meters(every=3, last=7)
    second.load_state_dict(first.state_dict())
    assert head + _run(second, STEPS[4:], first=5) == whole


def test_a_state_of_an_earlier_version_brings_the_average_only():
    meters = Meters()
    meters.load_state_dict({"average": 0.25})
    assert meters.average == 0.25
