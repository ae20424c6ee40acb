"""Samplers that sd-scripts does not have against their published recurrences, and against diffusers'."""

import importlib
import sys
from itertools import pairwise
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from library.inference import samplers
from library.inference.denoise import denoise
from tests.inference.test_samplers import ALPHAS, gaussian_noise_prediction, gaussian_velocity_prediction

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and NumPy 2

SIGMAS = ((1 - ALPHAS) / ALPHAS).sqrt().numpy()
SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 8, 8)


def spread(name, steps):
    """Sigmas of Karras et al. 2022, eq. 5 with rho 7, or evenly spaced in log sigma; then 0."""
    low, high, ramp = SIGMAS[0], SIGMAS[-1], np.linspace(0, 1, steps)
    if name == "karras":
        return np.append((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7, 0.0)
    return np.append(np.exp(np.log(high) + ramp * np.log(low / high)), 0.0)


def generator():
    return torch.Generator().manual_seed(4)


def ours(name, *, steps, prediction_type="epsilon", eta=None):
    scheduler = samplers.make_scheduler(name, prediction_type=prediction_type, steps=steps, eta=eta)
    predict = gaussian_noise_prediction if prediction_type == "epsilon" else gaussian_velocity_prediction
    g = generator()
    return scheduler, denoise(predict, samplers.start_noise([g], SHAPE), scheduler, generators=[g])[0]


def picture(x, sigma):
    """The predicted picture for normal data of standard deviation 1/2: x = x0 + sigma * noise."""
    return x * 0.25 / (0.25 + sigma**2)


def drawn(g):
    return torch.randn(SHAPE, generator=g).double()


def dpmpp_2m(sigmas, g, *, sde=False):
    """k-diffusion's sample_dpmpp_2m and sample_dpmpp_2m_sde (midpoint, eta 1), with lambda = -log sigma."""
    x, old = drawn(g) * sigmas[0], None
    for index in range(len(sigmas) - 1):
        here, there = sigmas[index], sigmas[index + 1]
        x0 = best = picture(x, here)
        noise = drawn(g) if sde else 0.0
        if there == 0:
            x = x0
            continue
        h = np.log(here / there)
        if old is not None:
            last = np.log(sigmas[index - 1] / here)
            best = x0 + (x0 - old) * h / (2 * last)
        if sde:
            x = (there / here) * np.exp(-h) * x - np.expm1(-2 * h) * best + there * np.sqrt(-np.expm1(-2 * h)) * noise
        else:
            x = (there / here) * x - np.expm1(-h) * best
        old = x0
    return x


class BrownianPath:
    """One path over sigma, drawn where it is asked for, in falling order: what k-diffusion takes from torchsde."""

    def __init__(self, g, start):
        self.g, self.last, self.at = g, start, {start: torch.zeros(1)}

    def __call__(self, here, there):
        here, there = (min([*self.at, s], key=lambda known, s=s: abs(known - s)) for s in (float(here), float(there)))
        if there not in self.at:
            near = [known for known in self.at if abs(known - there) < 1e-4 * there]
            there = near[0] if near else there
        if there not in self.at:
            self.at[there] = self.at[self.last] + (self.last - there) ** 0.5 * drawn(self.g)
            self.last = there
        return (self.at[there] - self.at[here]) / (here - there) ** 0.5


def dpmpp_sde(sigmas, g, *, eta=1.0):
    """k-diffusion's sample_dpmpp_sde with r = 1/2, written as there."""
    x = drawn(g) * sigmas[0]
    path = BrownianPath(g, float(sigmas[0]))

    def ancestral(here, there):
        up = min(there, eta * (there**2 * (here**2 - there**2) / here**2) ** 0.5)
        return (there**2 - up**2) ** 0.5, up

    for here, there in pairwise(sigmas):
        x0 = picture(x, here)
        if there == 0:
            return x0
        t, t_next = -np.log(here), -np.log(there)
        middle = np.exp(-(t + (t_next - t) / 2))
        down, up = ancestral(here, middle)
        second = (down / here) * x - np.expm1(t + np.log(down)) * x0 + path(here, middle) * up
        x0 = picture(second, middle)
        down, up = ancestral(here, there)
        x = (down / here) * x - np.expm1(t + np.log(down)) * x0 + path(here, there) * up


@pytest.mark.parametrize("steps", [2, 9, 20])
@pytest.mark.parametrize("name", ["karras", "exponential"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_dpmpp_follows_the_published_recurrences_on_spread_sigmas(name, steps, prediction_type):
    sigmas = spread(name, steps)
    for sampler, wanted in (
        ("dpmpp_2m", dpmpp_2m(sigmas, generator())),
        ("dpmpp_2m_sde", dpmpp_2m(sigmas, generator(), sde=True)),
        ("dpmpp_sde", dpmpp_sde(sigmas, generator())),
    ):
        scheduler, result = ours(f"{sampler}_{name}", steps=steps, prediction_type=prediction_type)
        torch.testing.assert_close(result.double(), wanted, atol=2e-3, rtol=2e-3)
        every = scheduler.sigmas[::2] if sampler == "dpmpp_sde" else scheduler.sigmas[:-1]
        np.testing.assert_allclose(every.numpy(), sigmas[:-1], rtol=1e-4)


@pytest.mark.parametrize("sampler", ["lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_every_sampler_with_a_suffix_has_those_sigmas_and_tells_the_model_their_timesteps(sampler, name):
    scheduler = samplers.make_scheduler(f"{sampler}_{name}", prediction_type="epsilon", steps=6)
    wanted = spread(name, 6)[:-1]
    found = scheduler.sigmas.numpy()
    assert all(np.isclose(found, sigma, rtol=1e-4).any() for sigma in wanted)
    timesteps = np.interp(np.log(wanted), np.log(SIGMAS), np.arange(1000))
    told = scheduler.timesteps.double().numpy()
    assert all(np.abs(told - timestep).min() < 0.02 for timestep in timesteps)
    assert (np.diff(told[::2]) <= 0).all()  # those between may belong to a lower sigma, from which noise leads up again
    plain = samplers.make_scheduler(sampler, prediction_type="epsilon", steps=6)
    assert len(plain.timesteps) == len(told) and not np.allclose(plain.timesteps.double().numpy(), told, atol=1)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_noise_of_dpmpp_sde_follows_eta(eta):
    _, result = ours("dpmpp_sde_karras", steps=6, eta=eta)
    wanted = dpmpp_sde(spread("karras", 6), generator(), eta=eta)
    torch.testing.assert_close(result.double(), wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("settings", [{}, {"use_karras_sigmas": True}])
def test_dpmpp_sde_equals_diffusers_on_the_same_brownian_motion(monkeypatch, settings):
    """diffusers' class is loaded without torchsde, from which it would only take its noise."""
    monkeypatch.setitem(sys.modules, "torchsde", SimpleNamespace())
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    theirs = module.DPMSolverSDEScheduler(**SETTINGS, **settings)
    theirs.set_timesteps(8)
    g = generator()
    noise = samplers.start_noise([g], SHAPE)
    theirs.noise_sampler = BrownianPath(g, float(theirs.sigmas[0]))
    wanted = denoise(gaussian_noise_prediction, noise, theirs, generators=[])[0]
    scheduler, result = ours("dpmpp_sde_karras" if settings else "dpmpp_sde", steps=8)
    torch.testing.assert_close(scheduler.timesteps.double(), theirs.timesteps.double(), atol=0.02, rtol=0)
    torch.testing.assert_close(result, wanted.float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_a_equals_diffusers(prediction_type):
    theirs = diffusers.EulerAncestralDiscreteScheduler(**SETTINGS, prediction_type=prediction_type)
    theirs.set_timesteps(7)
    g = generator()
    noise = samplers.start_noise([g], SHAPE)
    predict = gaussian_noise_prediction if prediction_type == "epsilon" else gaussian_velocity_prediction
    wanted = denoise(predict, noise, theirs, generators=[g])[0]
    torch.testing.assert_close(
        ours("euler_a", steps=7, prediction_type=prediction_type)[1], wanted, atol=1e-4, rtol=1e-4
    )


def test_euler_a_without_noise_is_euler():
    euler, ancestral = (ours(name, steps=9, eta=eta)[1] for name, eta in (("euler", None), ("euler_a", 0.0)))
    torch.testing.assert_close(euler, ancestral, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(euler, ours("euler_a", steps=9, eta=0.1)[1], atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_follows_its_equation_for_every_eta(eta):
    """Song et al. 2021, eq. 12 and 16."""
    g = generator()
    x = drawn(g)
    for index in range(5):
        t = torch.tensor((4 - index) * 200 + 1)
        a, last = ALPHAS[t], ALPHAS[t - 200] if index < 4 else torch.ones(())  # the last step ends without noise
        noise = gaussian_noise_prediction(x, t).double()
        x0 = (x - (1 - a).sqrt() * noise) / a.sqrt()
        sigma = eta * ((1 - last) / (1 - a)).sqrt() * (1 - a / last).sqrt()
        x = last.sqrt() * x0 + (1 - last - sigma**2).sqrt() * noise + (sigma * drawn(g) if eta else 0)
    torch.testing.assert_close(ours("ddim", steps=5, eta=eta)[1].double(), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_lcm_draws_anew_at_the_timesteps_of_its_distillation(prediction_type):
    """Luo et al. 2023, algorithm 1, with the boundary conditions of section 4.1 (timestep scaled by 10)."""
    g = generator()
    x, timesteps = drawn(g), (999, 759, 499, 259)
    scheduler, result = ours("lcm", steps=4, prediction_type=prediction_type)
    assert scheduler.timesteps.tolist() == list(timesteps)
    for t, then in zip(timesteps, (*timesteps[1:], None), strict=True):
        a = ALPHAS[t]
        noise = gaussian_noise_prediction(x, torch.tensor(t)).double()
        x0 = (x - (1 - a).sqrt() * noise) / a.sqrt()
        scaled = t * 10.0
        x = scaled / (scaled**2 + 0.25) ** 0.5 * x0 + 0.25 / (scaled**2 + 0.25) * x
        if then is not None:
            x = ALPHAS[then].sqrt() * x + (1 - ALPHAS[then]).sqrt() * drawn(g)
    torch.testing.assert_close(result.double(), x, atol=1e-4, rtol=1e-4)
