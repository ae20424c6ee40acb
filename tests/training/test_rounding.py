"""Stochastic rounding to bfloat16: unbiased, exact where bfloat16 is, and a function of the seed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.training.rounding import round_stochastically
from library.training.tensor_step import Widening
from library.training.update import GuardedUpdate


def _source(seed=0):
    return torch.Generator().manual_seed(seed)


def _neighbours(x: float) -> tuple[float, float]:
    """The bfloat16 values below and above x by magnitude, from the definition: 8 bits of precision."""
    gap = 2.0 ** (math.floor(math.log2(abs(x))) - 7)
    low = math.floor(abs(x) / gap) * gap
    return math.copysign(low, x), math.copysign(low + gap, x)


@pytest.mark.parametrize("x", [1.001, -1.001, 0.3, -0.0123456, 3.999, 1e-30, -12345.678])
def test_the_mean_is_the_value_and_only_its_neighbours_occur(x):
    n = 1_000_000
    x = float(torch.tensor(x))
    low, high = _neighbours(x)
    got = round_stochastically(torch.full((n,), x), _source()).double()
    assert set(got.unique().tolist()) == {low, high}
    share = (x - low) / (high - low)
    # Five standard deviations of a mean of n draws, and the 2**-16 by which 16 random bits can miss a share.
    tolerance = 5 * math.sqrt(share * (1 - share) / n) + 2.0**-16
    assert abs(float((got == high).double().mean()) - share) < tolerance


def test_values_that_bfloat16_holds_stay():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    got = round_stochastically(every.float(), _source())
    finite = torch.isfinite(every)
    assert torch.equal(got[finite].view(torch.int16), every[finite].view(torch.int16))  # -0 and subnormals too
    assert torch.equal(got[every.isinf()], every[every.isinf()])
    assert got[every.isnan()].isnan().all()


def test_not_a_number_stays_so_whatever_its_payload():
    payloads = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F80FFFF], dtype=torch.int64)
    values = torch.cat([payloads, payloads | 0x80000000]).to(torch.int32).view(torch.float32)
    assert round_stochastically(values.repeat(1000), _source()).isnan().all()


def test_a_finite_value_never_becomes_infinite():
    largest = torch.finfo(torch.float32).max
    got = round_stochastically(torch.tensor([largest, -largest]).repeat(1000), _source())
    assert torch.isfinite(got).all() and float(got.float().abs().min()) == torch.finfo(torch.bfloat16).max


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=2.0**-120, max_value=2.0**120), st.booleans()
)
def test_the_result_is_one_of_the_neighbours(x, negative):
    x = -x if negative else x
    (got,) = round_stochastically(torch.tensor([x]), _source()).tolist()
    low, high = _neighbours(x)
    assert got == x if low == x else got in (low, high)


def test_the_pattern_is_the_seeds():
    x = torch.rand(1000, generator=_source(1))
    assert torch.equal(round_stochastically(x, _source(5)), round_stochastically(x, _source(5)))
    assert not torch.equal(round_stochastically(x, _source(5)), round_stochastically(x, _source(6)))


def test_a_transposed_tensor_keeps_its_places():
    x = torch.rand(30, 50, generator=_source(1))
    got = round_stochastically(x.t(), _source())
    assert got.shape == (50, 30) and float((got.float() - x.t()).abs().max()) < 2.0**-8


# The promise of full bf16 ---------------------------------------------------------------------------------------------

RATE, STEPS = 1e-6, 100


def _moved(dtype, widening):
    """Mean movement of weights of size 0.02 to 0.04 under AdamW at RATE, whose steps are about the rate itself."""
    start = (torch.rand(64, 256, generator=_source(3)) * 0.02 + 0.02).to(torch.bfloat16)
    p = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = torch.optim.AdamW([{"params": [p], "lr": RATE}], weight_decay=0.0)
    update = GuardedUpdate(optimizer, 0.0, widening=widening)
    for step in range(STEPS):
        if widening is not None:
            widening.global_step = lambda step=step: step
        p.grad = (torch.rand(p.shape, generator=_source(100 + step)) + 0.5).to(dtype)
        update()
    return float((p.detach().double() - start.double()).mean())


def test_at_rate_1e6_bf16_weights_move_as_float32_ones_do_and_nearest_rounding_does_not():
    """Movement in float32: about -1e-4, less than the gap of bfloat16 there (1.2e-4 to 2.4e-4).

    AdamW steps by RATE times mean over root mean square of the gradient, which for uniform numbers in 0.5..1.5 is
    1 / sqrt(13/12). That is 0.4% to 0.8% of the gap, so rounding to the nearest takes all of it back each time.
    """
    wide = _moved(torch.float32, None)
    assert wide == pytest.approx(-STEPS * RATE / math.sqrt(13 / 12), rel=0.01)
    chance = _moved(torch.bfloat16, Widening(7, lambda: 0, stochastic=True))
    # The movement of one weight has a standard deviation of about the gap; the mean of 16,384 of them 128 times less.
    assert chance == pytest.approx(wide, abs=5 * 2.4e-4 / 128)
    assert _moved(torch.bfloat16, Widening(7, lambda: 0, stochastic=False)) == 0
    assert _moved(torch.bfloat16, None) == 0


def test_the_bits_are_a_function_of_seed_step_and_place_alone():
    def run(seed, steps, order):
        params = [torch.nn.Parameter(torch.full((40, 40), 0.5, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": params, "lr": 1e-4}])
        progress = [0]
        widening = Widening(seed, lambda: progress[0], stochastic=True)
        update = GuardedUpdate(optimizer, 0.0, widening=widening)
        update.params = [update.params[i] for i in order]
        for step in steps:
            progress[0] = step
            for p in params:
                p.grad = torch.ones_like(p)
            update()
        return [p.detach() for p in params]

    first = run(1, (0, 1), (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, run(1, (0, 1), (1, 0)), strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], run(2, (0, 1), (0, 1))[0])
    assert not torch.equal(first[0], run(1, (0, 2), (0, 1))[0])
