"""DREAM against diffusers, and what it means for both predictions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_dream_and_update_latents
from hypothesis import given, settings
from hypothesis import strategies as st

from library.diffusion.dream import dream_change, predicted_noise
from library.diffusion.schedule import NoiseSchedule
from library.diffusion.targets import training_target

SCHEDULE = NoiseSchedule.scaled_linear()


def _tensors(seed: int, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, 3, 4, 3, 5, generator=generator, dtype=dtype)[:3])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 3.0])
def test_noise_prediction_equals_diffusers(power):
    x0, noise, prediction = _tensors(1)
    t = torch.tensor([3, 400, 990])
    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noisy = ddpm.add_noise(x0, noise, t)
    theirs = compute_dream_and_update_latents(
        lambda *inputs: SimpleNamespace(sample=prediction), ddpm, t, noise, noisy.clone(), noise.clone(), None, power
    )
    change = dream_change(noise, prediction, t, schedule=SCHEDULE, detail_preservation=power)
    torch.testing.assert_close(SCHEDULE.add_noise(x0, noise + change, t), theirs[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(noise + change, theirs[1], rtol=0, atol=5e-5)


@given(seed=st.integers(0, 2**31), t=st.lists(st.integers(0, 999), min_size=3, max_size=3))
@settings(max_examples=30, deadline=None)
def test_a_velocity_implies_the_noise_that_it_was_made_of(seed, t):
    x0, noise, _ = _tensors(seed, dtype=torch.float64)
    t_B = torch.tensor(t)
    noisy = SCHEDULE.add_noise(x0, noise, t_B)
    for kind in ("epsilon", "v_prediction"):
        target = training_target(kind, schedule=SCHEDULE, x0=x0, noise=noise, t=t_B)
        implied = predicted_noise(target, noisy, t_B, schedule=SCHEDULE, prediction_type=kind)
        torch.testing.assert_close(implied, noise, rtol=0, atol=1e-9)


@given(seed=st.integers(0, 2**31), t=st.integers(0, 999), power=st.floats(0, 4))
@settings(max_examples=30, deadline=None)
def test_a_perfect_model_changes_nothing_and_power_zero_takes_the_prediction_for_the_noise(seed, t, power):
    _, noise, prediction = _tensors(seed, dtype=torch.float64)
    t_B = torch.full((3,), t)
    nothing = dream_change(noise, noise, t_B, schedule=SCHEDULE, detail_preservation=power)
    assert torch.count_nonzero(nothing) == 0
    whole = dream_change(noise, prediction, t_B, schedule=SCHEDULE, detail_preservation=0.0)
    torch.testing.assert_close(noise + whole, 2 * noise - prediction)


def test_detail_is_preserved_most_where_there_is_little_noise():
    _, noise, prediction = _tensors(2)
    t = torch.tensor([10, 500, 999])
    sizes = [
        dream_change(noise, prediction, t, schedule=SCHEDULE, detail_preservation=p).flatten(1).norm(dim=1)
        for p in (1.0, 2.0)
    ]
    ratio = sizes[1] / sizes[0]
    assert ratio[0] < ratio[1] < ratio[2] < 1
    torch.testing.assert_close(ratio.double(), (1 - SCHEDULE.alphas_cumprod_N[t]).sqrt(), rtol=1e-4, atol=0)
    with pytest.raises(AssertionError, match="flow"):
        predicted_noise(noise, noise, t, schedule=SCHEDULE, prediction_type="flow")
