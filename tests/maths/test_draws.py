"""Timesteps and noise: uniform, bounded, and a function of the generator alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.diffusion.noise import sample_noise
from library.diffusion.timesteps import sample_timestep


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 2**62), low=st.integers(0, 998), span=st.integers(1, 1000))
@settings(max_examples=100, deadline=None)
def test_timesteps_stay_in_the_half_open_range(seed: int, low: int, span: int) -> None:
    high = min(low + span, 1000)
    t = sample_timestep(_generator(seed), min_timestep=low, max_timestep=high)
    assert low <= t < high


def test_timesteps_are_uniform_over_the_whole_schedule_by_default() -> None:
    generator = _generator(0)
    draws = torch.tensor([sample_timestep(generator) for _ in range(8000)])
    counts = torch.histc(draws.float(), bins=10, min=0, max=1000)
    # 800 expected per bin, standard deviation 27
    assert counts.min() > 680 and counts.max() < 920
    assert draws.min() < 5 and draws.max() > 994


def test_both_ends_of_the_range_occur_and_the_upper_bound_does_not() -> None:
    generator = _generator(3)
    assert {sample_timestep(generator, min_timestep=5, max_timestep=8) for _ in range(100)} == {5, 6, 7}


@pytest.mark.parametrize(("low", "high", "expected"), [(500, 500, 500), (700, 300, 300), (0, 0, 0), (1000, 1000, 999)])
def test_an_empty_range_means_always_the_maximum(low: int, high: int, expected: int) -> None:
    generator = _generator(1)
    assert {sample_timestep(generator, min_timestep=low, max_timestep=high) for _ in range(20)} == {expected}


def test_one_number_is_drawn_whatever_the_range() -> None:
    """So that narrowing the range does not move the noise that is drawn after it."""
    after = []
    for low, high in [(None, None), (5, 9), (7, 7), (9, 5)]:
        generator = _generator(4)
        sample_timestep(generator, min_timestep=low, max_timestep=high)
        after.append(sample_noise(generator, (4,)))
    assert all(torch.equal(after[0], noise) for noise in after[1:])


def test_a_range_outside_the_schedule_is_refused() -> None:
    for low, high in [(-1, 10), (0, 1001), (5, -1)]:
        with pytest.raises(AssertionError):
            sample_timestep(_generator(0), min_timestep=low, max_timestep=high)


def test_noise_depends_on_the_generator_and_not_on_global_state() -> None:
    torch.manual_seed(1)
    first = sample_noise(_generator(5), (4, 8, 8))
    torch.manual_seed(2)
    assert torch.equal(first, sample_noise(_generator(5), (4, 8, 8)))
    assert not torch.equal(first, sample_noise(_generator(6), (4, 8, 8)))


def test_noise_is_standard_normal_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        noise = sample_noise(_generator(7), (4, 64, 64))
    finally:
        torch.set_default_dtype(torch.float32)
    assert noise.dtype == torch.float32 and noise.shape == (4, 64, 64)
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.02
