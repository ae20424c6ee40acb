"""Samplers against exact solutions, against diffusers, and in where their noise comes from."""

import diffusers
import pytest
import torch

from library.config.choices import SAMPLERS, default_eta, split_sampler
from library.diffusion.schedule import NoiseSchedule
from library.errors import UserError
from library.inference import samplers
from library.inference.denoise import denoise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and NumPy 2

SPREAD = 0.5
DETERMINISTIC = ("ddim", "pndm", "lms", "euler", "heun", "dpm_2", "dpmsolver", "dpmpp_2m", "dpmsingle", "unipc")
ANCESTRAL = ("euler_a", "dpm_2_a", "dpmpp_2m_sde", "dpmpp_sde")
BASIC = (*DETERMINISTIC, *ANCESTRAL, "lcm")  # the others are second names of these, or have their sigmas spread
SPREAD_OUT = tuple(name for name in SAMPLERS if split_sampler(name)[1])
SLOW = ("heun", "dpm_2", "dpm_2_a")  # to set up
ALPHAS = NoiseSchedule.scaled_linear().alphas_cumprod_N


def alpha_at(t: torch.Tensor) -> torch.Tensor:
    """alphas_cumprod at a timestep that need not be whole, interpolated as the samplers do: log sigma is linear."""
    low, high = t.double().floor().long(), t.double().ceil().long()
    log_sigmas = ((1 - ALPHAS) / ALPHAS).log() / 2
    sigma = torch.lerp(log_sigmas[low], log_sigmas[high], t.double() - low).exp()
    return 1 / (1 + sigma**2)


def gaussian_noise_prediction(x, t):
    """The exact prediction for data that are normal with standard deviation SPREAD."""
    a = alpha_at(t)
    return (x.double() * (1 - a).sqrt() / (a * SPREAD**2 + 1 - a)).float()


def gaussian_velocity_prediction(x, t):
    a = alpha_at(t)
    noise = gaussian_noise_prediction(x, t).double()
    x0 = (x.double() - (1 - a).sqrt() * noise) / a.sqrt()
    return (a.sqrt() * noise - (1 - a).sqrt() * x0).float()


def draw(name, *, steps, seeds=(0, 1), prediction_type="epsilon", shape=(4, 8, 8), eta=None):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scheduler = samplers.make_scheduler(name, prediction_type=prediction_type, steps=steps, eta=eta)
    predict = gaussian_noise_prediction if prediction_type == "epsilon" else gaussian_velocity_prediction
    return denoise(predict, samplers.start_noise(generators, shape), scheduler, generators=generators)


def test_the_names_are_those_that_the_options_accept():
    second_names = {"k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a", "dpmsolver++"}
    assert set(SAMPLERS) - set(BASIC) - set(SPREAD_OUT) == second_names
    assert len(SAMPLERS) == len(set(SAMPLERS)) and len(SPREAD_OUT) == 20
    for name in SAMPLERS:
        if split_sampler(name)[0] in SLOW:
            continue
        scheduler = samplers.make_scheduler(name, prediction_type="epsilon", steps=7)
        assert getattr(scheduler, "eta", None) == default_eta(name)


@pytest.mark.parametrize("name", [*DETERMINISTIC, *(n for n in SPREAD_OUT if split_sampler(n)[0] in DETERMINISTIC)])
def test_deterministic_samplers_solve_the_gaussian_problem(name):
    """The exact flow of normal data scales the start noise by SPREAD (times a factor near 1 for the finite start)."""
    noise = samplers.start_noise([torch.Generator().manual_seed(seed) for seed in (0, 1)], (4, 8, 8))
    error = draw(name, steps=200) / noise - SPREAD
    # The end at t = 0 or 1 rather than sigma 0, and the start at sigma 14.6, bound what is possible.
    assert error.abs().max() < 0.03


@pytest.mark.parametrize(
    ("name", "eta"),
    [(name, None) for name in (*ANCESTRAL, *(n for n in SPREAD_OUT if split_sampler(n)[0] in ANCESTRAL))]
    + [("ddim", 1.0), ("ddim", 0.4), ("euler_a", 0.4), ("dpmpp_sde", 0.4)],
)
def test_samplers_with_noise_end_with_the_spread_of_the_data(name, eta):
    result = draw(name, steps=200, seeds=range(4), shape=(4, 32, 32), eta=eta)
    assert abs(float(result.std()) - SPREAD) < 0.03 and abs(float(result.mean())) < 0.02


@pytest.mark.parametrize("name", BASIC)
def test_velocity_and_noise_models_give_the_same_picture(name):
    noise, velocity = (draw(name, steps=12, prediction_type=kind) for kind in ("epsilon", "v_prediction"))
    torch.testing.assert_close(noise, velocity, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, steps) for name in BASIC if name != "pndm" for steps in (1, 2, 3)]
    + [(name, steps) for name in SPREAD_OUT if split_sampler(name)[0] not in SLOW for steps in (1, 2)]
    + [(name, 1000) for name in BASIC if name not in (*SLOW, "lcm")],
)
def test_few_and_all_steps_give_finite_pictures(name, steps):
    result = draw(name, steps=steps, seeds=(0,), shape=(1, 2, 2))
    assert torch.isfinite(result).all()
    if steps == 1:  # one step from pure noise is the mean of the data, not the noise itself
        assert result.abs().max() < 0.4


def test_too_few_steps_and_unknown_names_are_refused():
    with pytest.raises(UserError):
        samplers.make_scheduler("pndm", prediction_type="epsilon", steps=3)
    with pytest.raises(UserError, match="lcm cannot do 51 steps"):
        samplers.make_scheduler("lcm", prediction_type="epsilon", steps=51)
    for name in ("eular", "ddim_karras", "karras"):
        with pytest.raises(UserError, match="is not a sampler"):
            samplers.make_scheduler(name, prediction_type="epsilon", steps=3)
    with pytest.raises(UserError, match="heun has no eta"):
        samplers.make_scheduler("heun", prediction_type="epsilon", steps=3, eta=0.5)


@pytest.mark.parametrize("steps", [1, 4, 11])
def test_lms_equals_diffusers_quadrature(steps):
    pytest.importorskip("scipy")
    ours = samplers.make_scheduler("lms", prediction_type="epsilon", steps=steps)
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = diffusers.LMSDiscreteScheduler(**settings, timestep_spacing=ours.config.timestep_spacing)
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps.double(), theirs.timesteps.double())
    noise = samplers.start_noise([torch.Generator().manual_seed(0)], (4, 8, 8))
    results = [denoise(gaussian_noise_prediction, noise, scheduler, generators=[]) for scheduler in (ours, theirs)]
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*BASIC, "dpmpp_sde_karras", "unipc_exponential"])
def test_a_picture_does_not_depend_on_its_place_or_its_neighbours(name):
    alone = draw(name, steps=6, seeds=(7,))[0]
    first, other, last = draw(name, steps=6, seeds=(7, 8, 7))
    assert torch.equal(first, alone) and torch.equal(last, alone)
    assert not torch.equal(other, alone)


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        *((name, 0) for name in DETERMINISTIC),
        ("euler_a", 6),
        ("dpm_2_a", 11),
        ("dpmpp_sde", 10),
        ("dpmpp_2m_sde", 6),
        ("lcm", 5),
    ],
)
def test_a_seed_is_used_for_the_start_and_then_once_for_each_call(name, draws):
    """After the run the generator stands where 1 + draws latents have been taken from it."""
    generator = torch.Generator().manual_seed(5)
    scheduler = samplers.make_scheduler(name, prediction_type="epsilon", steps=6)
    state = torch.get_rng_state()
    noise = samplers.start_noise([generator], (4, 8, 8))
    denoise(gaussian_noise_prediction, noise, scheduler, generators=[generator])
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    expected = torch.Generator().manual_seed(5)
    for _ in range(1 + draws):
        torch.randn(4, 8, 8, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())
