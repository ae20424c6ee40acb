"""Weights of the timesteps: closed forms at five timesteps, limits where the signal is gone, and what they mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from library.diffusion.schedule import NoiseSchedule
from library.diffusion.weighting import Weighting

STEPS = (0, 100, 500, 900, 999)
KINDS = ("epsilon", "v_prediction")
ONE_OF_EACH = (
    Weighting(min_snr_gamma=5.0),
    Weighting(soft_min_snr_gamma=5.0),
    Weighting(p2_gamma=0.5, p2_k=2.0),
    Weighting(scale_v_like_noise=True),
    Weighting(v_like_loss=0.3),
    Weighting(debiased=True),
)


def _ratios(*, zero_terminal: bool) -> np.ndarray:
    """Signal-to-noise ratios of all steps, from the betas, without the code under test."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if zero_terminal:
        roots = np.sqrt(alphas)
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return alphas / (1 - alphas)


def _schedule(*, zero_terminal: bool) -> NoiseSchedule:
    ratios = torch.from_numpy(_ratios(zero_terminal=zero_terminal))
    return NoiseSchedule.variance_preserving(ratios / (1 + ratios))


def _expected(weighting: Weighting, s: float, kind: str) -> float:
    """The table of the specification, written out for one number."""
    v, capped = kind == "v_prediction", min(s, 1000.0)
    if weighting.min_snr_gamma:
        gamma = weighting.min_snr_gamma
        return min(s, gamma) / (s + 1) if v else (min(s, gamma) / s if s else 1.0)
    if weighting.soft_min_snr_gamma:
        gamma = weighting.soft_min_snr_gamma
        smooth = s * gamma / (s + gamma)
        return smooth / (s + 1) if v else (smooth / s if s else 1.0)
    if weighting.p2_gamma:
        return 1 / (weighting.p2_k + s) ** weighting.p2_gamma * (s / (s + 1) if v else 1.0)
    if weighting.scale_v_like_noise:
        return capped / (capped + 1)
    if weighting.v_like_loss:
        capped = max(capped, 0.001)
        return 1 + weighting.v_like_loss * (capped + 1) / capped
    assert weighting.debiased
    return 1 / (capped + 1) if v else 1 / math.sqrt(max(capped, 0.001))


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ONE_OF_EACH, ids=lambda w: w.acting[0])
def test_weights_equal_their_closed_form(weighting, kind, zero_terminal):
    schedule = _schedule(zero_terminal=zero_terminal)
    found = weighting.factor(schedule.snr(torch.tensor(STEPS)), kind)
    expected = [_expected(weighting, _ratios(zero_terminal=zero_terminal)[t], kind) for t in STEPS]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert bool((found >= 0).all()) and bool(torch.isfinite(found).all())


# From decimal arithmetic of 40 digits on the betas; a change of the closed form above would not go unseen.
GOLDEN = {
    ("min_snr_gamma", "epsilon"): [0.00425362, 0.591443, 1.0, 1.0, 1.0],
    ("min_snr_gamma", "v_prediction"): [0.00425000, 0.528883, 0.276333, 0.0141511, 0.00466010],
    ("soft_min_snr_gamma", "epsilon"): [0.00423560, 0.371640, 0.929048, 0.997137, 0.999064],
    ("debiased", "epsilon"): [0.0316228, 0.343931, 1.61828, 8.34660, 14.6146],
    ("debiased", "v_prediction"): [0.000999001, 0.105777, 0.723667, 0.985849, 0.995340],
}


@pytest.mark.parametrize(("name", "kind"), GOLDEN)
def test_weights_have_the_known_numbers(name, kind):
    weighting = Weighting(**{name: True if name == "debiased" else 5.0})
    found = weighting.factor(NoiseSchedule.scaled_linear().snr(torch.tensor(STEPS)), kind)
    assert found.tolist() == pytest.approx(GOLDEN[name, kind], rel=2e-5)


def test_ratios_equal_those_of_diffusers_at_every_step():
    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(1000)
    ours = NoiseSchedule.scaled_linear().snr(t)
    torch.testing.assert_close(ours.float(), compute_snr(ddpm, t), rtol=3e-4, atol=0)
    ddpm.alphas_cumprod = (1 - rescale_zero_terminal_snr(ddpm.betas.double())).cumprod(0)
    rescaled = _schedule(zero_terminal=True).snr(t)
    torch.testing.assert_close(rescaled.float(), compute_snr(ddpm, t), rtol=1e-3, atol=1e-9)
    assert rescaled[-1] == 0


@pytest.mark.parametrize("seed", range(2))
def test_noising_and_velocity_equal_those_of_diffusers_at_every_step(seed):
    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule, t = NoiseSchedule.scaled_linear(), torch.arange(1000)
    x0, noise = torch.randn(2, 1000, 2, 2, 3, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), ddpm.add_noise(x0, noise, t), rtol=0, atol=2e-5)
    torch.testing.assert_close(schedule.velocity(x0, noise, t), ddpm.get_velocity(x0, noise, t), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("weighting", "kind", "limit"),
    [
        (Weighting(min_snr_gamma=5.0), "epsilon", 1.0),
        (Weighting(min_snr_gamma=5.0), "v_prediction", 0.0),
        (Weighting(soft_min_snr_gamma=5.0), "epsilon", 1.0),
        (Weighting(soft_min_snr_gamma=5.0), "v_prediction", 0.0),
        (Weighting(p2_gamma=1.0, p2_k=4.0), "epsilon", 0.25),
        (Weighting(p2_gamma=1.0, p2_k=4.0), "v_prediction", 0.0),
        (Weighting(scale_v_like_noise=True), "v_prediction", 0.0),
        (Weighting(debiased=True), "epsilon", math.sqrt(1000)),
        (Weighting(debiased=True), "v_prediction", 1.0),
        (Weighting(v_like_loss=2.0), "epsilon", 2003.0),
    ],
)
def test_without_any_signal_weights_have_their_limit(weighting, kind, limit):
    snr = torch.zeros(1, dtype=torch.float64)
    assert weighting.factor(snr, kind).item() == pytest.approx(limit, rel=1e-12)
    near = torch.full((1,), 1e-9, dtype=torch.float64)
    assert weighting.factor(near, kind).item() == pytest.approx(limit, rel=1e-6, abs=1e-6)


@given(t=st.integers(0, 999), gamma=st.floats(0.1, 30), k=st.floats(0.1, 5), power=st.floats(0.1, 3))
def test_noise_and_velocity_weigh_the_clean_latent_alike(t, gamma, k, power):
    """The same error of the clean latent has the same weighted loss, whichever quantity is predicted.

    An error e of the clean latent is one of e * sqrt(snr) in the noise and of e * sqrt(snr + 1) in the velocity.
    """
    snr = NoiseSchedule.scaled_linear().snr(torch.tensor([t]))
    for weighting in (
        Weighting(min_snr_gamma=gamma),
        Weighting(soft_min_snr_gamma=gamma),
        Weighting(p2_gamma=power, p2_k=k),
    ):
        noise = weighting.factor(snr, "epsilon") * snr
        velocity = weighting.factor(snr, "v_prediction") * (snr + 1)
        torch.testing.assert_close(noise, velocity, rtol=1e-9, atol=0)


def test_scaling_the_velocity_gives_the_loss_of_the_noise_and_back():
    snr = NoiseSchedule.scaled_linear().snr(torch.tensor([100, 500, 999]))
    scaled = Weighting(scale_v_like_noise=True).factor(snr, "v_prediction")
    torch.testing.assert_close(scaled * (snr + 1), snr, rtol=1e-9, atol=0)
    added = Weighting(v_like_loss=1.0).factor(snr, "epsilon") - 1
    torch.testing.assert_close(added * scaled, torch.ones_like(snr), rtol=1e-9, atol=0)


def test_the_cap_of_sd_scripts_acts_where_there_is_hardly_any_noise():
    snr = torch.tensor([1175.4], dtype=torch.float64)
    assert Weighting(debiased=True).factor(snr, "epsilon").item() == pytest.approx(1 / math.sqrt(1000), rel=1e-9)
    assert Weighting(scale_v_like_noise=True).factor(snr, "v_prediction").item() == pytest.approx(1000 / 1001, rel=1e-9)
    assert Weighting(min_snr_gamma=2000.0).factor(snr, "epsilon").item() == 1


def test_weights_are_multiplied():
    snr = NoiseSchedule.scaled_linear().snr(torch.tensor(STEPS))
    both = Weighting(min_snr_gamma=5.0, v_like_loss=0.3, debiased=True).factor(snr, "epsilon")
    alone = [
        weighting.factor(snr, "epsilon")
        for weighting in (Weighting(min_snr_gamma=5.0), Weighting(v_like_loss=0.3), Weighting(debiased=True))
    ]
    torch.testing.assert_close(both, alone[0] * alone[1] * alone[2])
    assert torch.equal(Weighting().factor(snr, "epsilon"), torch.ones(5, dtype=torch.float64))
    assert Weighting().acting == ()


def test_another_prediction_has_no_weights():
    with pytest.raises(AssertionError, match="flow"):
        Weighting(min_snr_gamma=5.0).factor(torch.ones(1), "flow")
    assert Weighting().factor(torch.ones(1), "flow").item() == 1
