"""NoiseSchedule against diffusers' schedulers, the spec's golden values and closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from library.diffusion.schedule import NoiseSchedule

SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear()


@pytest.fixture(scope="module")
def ddpm() -> DDPMScheduler:
    return DDPMScheduler(**SDXL)


def _samples(seed: int, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, batch, 4, 8, 6, generator=generator)
    return x0, noise, torch.randint(0, 1000, (batch,), generator=generator)


def test_alphas_equal_the_diffusers_scheduler(schedule: NoiseSchedule, ddpm: DDPMScheduler) -> None:
    torch.testing.assert_close(schedule.alphas_cumprod_N.float(), ddpm.alphas_cumprod, rtol=1e-4, atol=0)
    assert schedule.num_steps == 1000
    assert torch.all(schedule.alphas_cumprod_N.diff() < 0)


@pytest.mark.parametrize("seed", range(3))
def test_noising_and_velocity_equal_the_diffusers_scheduler(
    schedule: NoiseSchedule, ddpm: DDPMScheduler, seed: int
) -> None:
    x0, noise, t = _samples(seed)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), ddpm.add_noise(x0, noise, t), rtol=0, atol=2e-5)
    torch.testing.assert_close(schedule.velocity(x0, noise, t), ddpm.get_velocity(x0, noise, t), rtol=0, atol=2e-5)


def test_noise_level_equals_the_euler_scheduler(schedule: NoiseSchedule) -> None:
    euler = EulerDiscreteScheduler(**SDXL)
    euler.set_timesteps(1000)
    ours = (1 / schedule.snr(torch.arange(999, -1, -1))).sqrt()
    torch.testing.assert_close(ours.float(), euler.sigmas[:-1], rtol=2e-4, atol=0)


@pytest.mark.parametrize(("t", "expected"), [(0, 1175.4), (999, 0.00468)])
def test_signal_to_noise_ratio_has_the_known_ends(schedule: NoiseSchedule, t: int, expected: float) -> None:
    assert float(schedule.snr(torch.tensor([t]))[0]) == pytest.approx(expected, rel=1e-3)


@given(t=st.integers(0, 999), x0=st.floats(-4, 4), noise=st.floats(-4, 4))
@settings(max_examples=60, deadline=None)
def test_noisy_sample_and_velocity_are_a_rotation(t: int, x0: float, noise: float) -> None:
    """(x_t, v) is (x0, noise) turned by an angle: turning back recovers both. A flipped sign breaks one of them."""
    schedule = NoiseSchedule.scaled_linear()
    t_B = torch.tensor([t])
    x0_BChw, noise_BChw = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (x0, noise))
    xt, v = schedule.add_noise(x0_BChw, noise_BChw, t_B), schedule.velocity(x0_BChw, noise_BChw, t_B)
    signal, sigma = schedule.signal(t_B, xt), schedule.sigma(t_B, xt)
    torch.testing.assert_close(signal * xt - sigma * v, x0_BChw, rtol=0, atol=1e-12)
    torch.testing.assert_close(sigma * xt + signal * v, noise_BChw, rtol=0, atol=1e-12)


def test_every_row_uses_its_own_timestep(schedule: NoiseSchedule) -> None:
    x0, noise, t = _samples(7)
    together = schedule.add_noise(x0, noise, t)
    alone = torch.cat([schedule.add_noise(x0[i : i + 1], noise[i : i + 1], t[i : i + 1]) for i in range(4)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_samples_stay_half(schedule: NoiseSchedule, dtype: torch.dtype) -> None:
    x0, noise, t = _samples(1)
    noisy = schedule.add_noise(x0.to(dtype), noise.to(dtype), t)
    assert noisy.dtype == dtype
    torch.testing.assert_close(noisy.float(), schedule.add_noise(x0, noise, t), rtol=0, atol=4e-2)


def test_moving_keeps_the_numbers(schedule: NoiseSchedule) -> None:
    assert torch.equal(schedule.to("cpu").alphas_cumprod_N, schedule.alphas_cumprod_N)


def test_a_table_of_lower_precision_is_refused() -> None:
    with pytest.raises(AssertionError):
        NoiseSchedule(torch.linspace(0.9, 0.1, 10))
