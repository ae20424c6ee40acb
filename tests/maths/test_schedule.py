"""NoiseSchedule against diffusers' schedulers, the spec's golden values and closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
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
    assert torch.equal(schedule.to("cpu").signal_N, schedule.signal_N)
    flow = NoiseSchedule.rectified_flow(shift=3)
    again = NoiseSchedule(**flow.to("cpu").tables())
    assert all(torch.equal(table, again.tables()[name]) for name, table in flow.tables().items())


def test_a_table_of_lower_precision_is_refused() -> None:
    with pytest.raises(AssertionError):
        NoiseSchedule.variance_preserving(torch.linspace(0.9, 0.1, 10))


def test_sdxl_tells_the_model_the_step_itself(schedule: NoiseSchedule) -> None:
    t_B = torch.tensor([0, 3, 999])
    assert torch.equal(schedule.timestep(t_B), t_B) and not schedule.ends_in_noise


# Zero terminal SNR


@pytest.fixture(scope="module")
def zero_snr() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(zero_terminal_snr=True)


def test_zero_terminal_snr_equals_diffusers_at_every_step(zero_snr: NoiseSchedule) -> None:
    theirs = DDPMScheduler(**SDXL, rescale_betas_zero_snr=True)
    t_N = torch.arange(1000)
    torch.testing.assert_close(zero_snr.alphas_cumprod_N.float(), theirs.alphas_cumprod, rtol=0, atol=2e-6)
    # In float32 the small alphas lose digits, so the ratio is compared where it still has some.
    theirs_snr = theirs.alphas_cumprod / (1 - theirs.alphas_cumprod)
    torch.testing.assert_close(zero_snr.snr(t_N)[:990].float(), theirs_snr[:990], rtol=2e-3, atol=0)
    x0, noise = torch.randn(2, 1000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    ours = [zero_snr.add_noise(x0, noise, t_N), zero_snr.velocity(x0, noise, t_N)]
    for mine, other in zip(ours, [theirs.add_noise(x0, noise, t_N), theirs.get_velocity(x0, noise, t_N)], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-3)
        torch.testing.assert_close(mine[:900], other[:900], rtol=0, atol=1e-4)


def test_zero_terminal_snr_ends_in_noise_and_begins_as_before(zero_snr: NoiseSchedule, schedule: NoiseSchedule) -> None:
    x0, noise, _ = _samples(2)
    last_B = torch.full((4,), 999)
    assert zero_snr.ends_in_noise and float(zero_snr.snr(last_B)[0]) == 0
    assert torch.equal(zero_snr.add_noise(x0, noise, last_B), noise)
    assert torch.equal(zero_snr.velocity(x0, noise, last_B), -x0)
    assert float(zero_snr.signal_N[0]) == pytest.approx(float(schedule.signal_N[0]), abs=1e-15)
    assert torch.all(zero_snr.signal_N.diff() < 0)
    torch.testing.assert_close(zero_snr.signal_N**2 + zero_snr.sigma_N**2, torch.ones(1000, dtype=torch.float64))


# Rectified flow


@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0])
def test_rectified_flow_equals_diffusers_at_every_step(shift: float) -> None:
    ours, theirs = NoiseSchedule.rectified_flow(shift=shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    t_N = torch.arange(999, -1, -1)  # their tables begin with the most noise
    torch.testing.assert_close(ours.sigma_N[t_N].float(), theirs.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.timestep(t_N), theirs.timesteps, rtol=1e-6, atol=0)
    assert ours.timestep(t_N).dtype == torch.float32
    x0, noise = torch.randn(2, 1000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    theirs_noisy = theirs.scale_noise(x0, theirs.timesteps, noise)
    torch.testing.assert_close(ours.add_noise(x0, noise, t_N), theirs_noisy, rtol=0, atol=2e-6)


@given(t=st.integers(0, 999), shift=st.floats(0.1, 20))
@settings(max_examples=60, deadline=None)
def test_a_shift_multiplies_the_ratio_of_noise_to_signal(t: int, shift: float) -> None:
    """s' / (1 - s') = shift * s / (1 - s), and signal and noise still sum to one."""
    even, shifted = NoiseSchedule.rectified_flow(), NoiseSchedule.rectified_flow(shift=shift)
    assert float(shifted.signal_N[t] + shifted.sigma_N[t]) == pytest.approx(1.0, abs=1e-12)
    assert float(even.sigma_N[t]) == (t + 1) / 1000
    ratio = float(even.sigma_N[t] / even.signal_N[t]) * shift
    assert float(shifted.sigma_N[t]) == pytest.approx(1 - 1 / (1 + ratio), rel=1e-9)


def test_rectified_flow_ends_in_noise_and_its_snr_is_that_of_its_mixture() -> None:
    flow = NoiseSchedule.rectified_flow()
    assert flow.ends_in_noise and float(flow.sigma_N[-1]) == 1
    assert float(flow.snr(torch.tensor([499]))[0]) == 1.0 and float(flow.snr(torch.tensor([249]))[0]) == 9.0
    assert float(flow.alphas_cumprod_N[249]) == pytest.approx(0.9)
