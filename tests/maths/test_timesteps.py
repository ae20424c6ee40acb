"""How often each timestep is drawn, and how evenly over the samples of a step."""

from __future__ import annotations

import argparse
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from library.diffusion.timesteps import (
    TimestepTable,
    biased,
    biased_steps,
    logit_normal_weights,
    sobol_number,
    stratified_number,
)


def _masses(table: TimestepTable) -> torch.Tensor:
    """The chance of each timestep, (N,)."""
    cumulative = torch.tensor(table.cumulative_N, dtype=torch.float64)
    return torch.diff(cumulative, prepend=torch.zeros(1, dtype=torch.float64))


@given(u=st.floats(0, 1, exclude_max=True), low=st.integers(0, 998), span=st.integers(1, 1000))
@settings(max_examples=100, deadline=None)
def test_timesteps_stay_in_the_half_open_range(u, low, span):
    high = min(low + span, 1000)
    assert low <= TimestepTable.uniform(low, high).at(u) < high


def test_a_uniform_table_gives_every_timestep_its_share():
    table = TimestepTable.uniform()
    assert [table.at((t + 0.5) / 1000) for t in range(1000)] == list(range(1000))
    assert (table.at(0.0), table.at(1 - 2**-53)) == (0, 999)
    assert [TimestepTable.uniform(5, 8).at(u) for u in (0, 0.33, 0.34, 0.66, 0.67, 0.99)] == [5, 5, 6, 6, 7, 7]


@pytest.mark.parametrize(("low", "high", "expected"), [(500, 500, 500), (700, 300, 300), (0, 0, 0), (1000, 1000, 999)])
def test_an_empty_range_means_always_the_maximum(low, high, expected):
    assert {TimestepTable.uniform(low, high).at(u / 20) for u in range(20)} == {expected}
    later = biased([1.0] * 1000, range(900, 1000), 3.0)
    assert {TimestepTable.of(later, low, high).at(u / 20) for u in range(20)} == {expected}


def test_a_range_outside_the_schedule_is_refused():
    for low, high in [(-1, 10), (0, 1001), (5, -1)]:
        with pytest.raises(AssertionError):
            TimestepTable.uniform(low, high)


def test_timesteps_without_a_chance_are_never_drawn():
    table = TimestepTable.of([0.0, 2.0, 0.0, 0.0, 1.0, 0.0])
    assert {table.at(u / 999) for u in range(999)} == {1, 4}
    assert (table.at(0.0), table.at(0.6666), table.at(0.6667), table.at(1 - 2**-53)) == (1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"0\.\.0"):
        TimestepTable.of([0.0, 2.0], 0, 1)


def _diffusers_weights(args: argparse.Namespace) -> torch.Tensor:
    """What the SDXL script of diffusers hands to its multinomial draw, derived anew from its description."""
    weights = torch.ones(1000, dtype=torch.float64)
    first, last = {
        "earlier": (0, int(args.portion * 1000)),
        "later": (1000 - int(args.portion * 1000), 1000),
        "range": (args.begin, args.end),
        "none": (0, 0),
    }[args.strategy]
    for t in range(first, last):
        weights[t] = args.multiplier
    return weights / weights.sum()


@pytest.mark.parametrize("strategy", ["none", "earlier", "later", "range"])
@pytest.mark.parametrize(
    ("multiplier", "portion", "begin", "end"), [(3.0, 0.25, 200, 500), (0.5, 0.3337, 0, 1000), (2.0, 0.001, 999, 1000)]
)
def test_a_bias_is_that_of_diffusers(strategy, multiplier, portion, begin, end):
    args = argparse.Namespace(strategy=strategy, multiplier=multiplier, portion=portion, begin=begin, end=end)
    favoured = biased_steps(strategy, portion=portion, begin=begin, end=end)
    table = TimestepTable.of(biased([1.0] * 1000, favoured, multiplier))
    torch.testing.assert_close(_masses(table), _diffusers_weights(args), rtol=1e-9, atol=1e-15)


def test_a_bias_acts_within_the_range_of_timesteps():
    table = TimestepTable.of(biased([1.0] * 1000, biased_steps("later"), 3.0), 740, 760)
    masses = _masses(table)
    assert masses[:740].sum() == 0 and masses[760:].sum() == 0
    assert masses[750].item() == pytest.approx(3 * masses[749].item(), rel=1e-9)
    assert masses[740:760].sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.0), (-1.2, 0.6)])
def test_logit_normal_timesteps_are_those_of_the_sigmoid_of_a_normal_number(mean, std):
    masses = _masses(TimestepTable.of(logit_normal_weights(mean, std)))
    normal = torch.randn(400_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drawn = (torch.sigmoid(normal * std + mean) * 1000).long()
    shares = torch.bincount(drawn // 50, minlength=20) / len(drawn)
    # the standard error of a share is at most 0.0006
    torch.testing.assert_close(masses.view(20, 50).sum(1), shares.double(), rtol=0, atol=0.004)
    assert masses.sum().item() == pytest.approx(1)


def test_a_positive_mean_favours_noise():
    later = _masses(TimestepTable.of(logit_normal_weights(1.0, 1.0)))
    assert later[500:].sum() > 0.8
    assert torch.allclose(later, _masses(TimestepTable.of(logit_normal_weights(-1.0, 1.0))).flip(0), atol=1e-12)


def test_sobol_numbers_are_the_sequence_of_torch():
    """torch counts in Gray code, so that the order differs, but every block of 2**k holds the same numbers."""
    engine = torch.quasirandom.SobolEngine(1, scramble=False)
    theirs = engine.draw(256, dtype=torch.float64).flatten()
    ours = torch.tensor([sobol_number(n, scramble=0) for n in range(256)], dtype=torch.float64)
    for size in (2, 8, 64, 256):
        assert torch.equal(ours[:size].sort().values, theirs[:size].sort().values)
    assert ours[:4].tolist() == [0.0, 0.5, 0.25, 0.75]


@given(seed=st.integers(0, 2**63 - 1), block=st.integers(0, 10**6), bits=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_every_block_of_a_scrambled_sobol_sequence_fills_every_part_once(seed, block, bits):
    size = 2**bits
    numbers = [sobol_number(block * size + n, scramble=seed) for n in range(size)]
    assert all(0 <= number < 1 for number in numbers)
    assert sorted(int(number * size) for number in numbers) == list(range(size))


def test_any_stretch_of_a_sobol_sequence_is_more_even_than_chance():
    rng = random.Random(0)
    for start in range(0, 500, 37):
        scramble = rng.getrandbits(63)
        even = [sobol_number(start + n, scramble=scramble) for n in range(24)]
        assert stats.kstest(even, "uniform").statistic < 0.08, "24 random numbers lie at 0.17 on average"


def test_one_place_of_the_sobol_sequence_is_uniform_over_its_scrambles():
    rng = random.Random(1)
    numbers = [sobol_number(5, scramble=rng.getrandbits(63)) for _ in range(4000)]
    assert stats.kstest(numbers, "uniform").pvalue > 0.001


@given(count=st.integers(1, 60), seed=st.integers(0, 2**62), jitter=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_strata_hold_one_sample_each(count, seed, jitter):
    numbers = [stratified_number(index, count, jitter=jitter, seed=seed) for index in range(count)]
    assert all(0 <= number < 1 for number in numbers)
    # half-way into the part, where rounding cannot move a number into the next one
    middles = [stratified_number(index, count, jitter=0.5, seed=seed) for index in range(count)]
    assert sorted(int(number * count) for number in middles) == list(range(count))


def test_a_sample_falls_into_every_stratum_and_anywhere_in_it():
    rng = random.Random(2)
    numbers = [stratified_number(1, 3, jitter=rng.random(), seed=seed) for seed in range(3000)]
    assert stats.kstest(numbers, "uniform").pvalue > 0.001
