"""Samplers for models of velocity with zero terminal SNR and of rectified flow: exact solutions, and diffusers."""

from dataclasses import replace

import diffusers
import pytest
import torch

from library.config.choices import FLOW_SAMPLERS, SAMPLERS
from library.errors import UserError
from library.inference import decoding, launch, samplers
from library.inference.denoise import denoise
from library.inference.launch import encode_requests
from library.inference.request import GenRequest
from library.models.families import sdxl
from library.models.prediction import schedule_for
from library.sizes import Size

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and NumPy 2

SPREAD = 0.5
ZERO_SNR = schedule_for("v_prediction", zero_terminal_snr=True)
ANCESTRAL = ("euler_a", "dpm_2_a", "dpmpp_2m_sde", "dpmpp_sde")
BASIC = ("ddim", "lms", "euler", "heun", "dpm_2", "dpmsolver", "dpmpp_2m", "dpmsingle", "unipc", *ANCESTRAL)


def velocity(x, t):
    """The exact velocity for normal data of standard deviation SPREAD under ZERO_SNR; log sigma is linear in t."""
    alphas_N = ZERO_SNR.alphas_cumprod_N.clone()
    alphas_N[-1] = 2.0**-24
    low, high = t.double().floor().long(), t.double().ceil().long()
    log_sigmas_N = ((1 - alphas_N) / alphas_N).log() / 2
    sigma = torch.lerp(log_sigmas_N[low], log_sigmas_N[high], t.double() - low).exp()
    a = 1 / (1 + sigma**2)
    variance = a * SPREAD**2 + 1 - a
    noise, x0 = x.double() * (1 - a).sqrt() / variance, x.double() * a.sqrt() * SPREAD**2 / variance
    return (a.sqrt() * noise - (1 - a).sqrt() * x0).float()


def flow(x, t):
    """The exact flow for the same data, t = 1000 * sigma."""
    s = t.double() / 1000
    variance = ((1 - s) * SPREAD) ** 2 + s**2
    noise, x0 = x.double() * s / variance, x.double() * (1 - s) * SPREAD**2 / variance
    return (noise - x0).float()


def draw(name, *, steps, kind="v_prediction", schedule=ZERO_SNR, seeds=(0, 1), shape=(4, 8, 8)):
    """(start noise, result)"""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scheduler = samplers.make_scheduler(name, prediction_type=kind, steps=steps, schedule=schedule)
    noise = samplers.start_noise(generators, shape)
    predict = flow if kind == "rectified_flow" else velocity
    return noise, denoise(predict, noise, scheduler, generators=generators)


@pytest.mark.parametrize("name", [name for name in BASIC if name not in ANCESTRAL])
def test_zero_terminal_snr_is_solved_from_pure_noise(name):
    """The exact flow scales the start noise by SPREAD, or a little more because samplers end at t = 0, not before."""
    noise, result = draw(name, steps=200)
    assert (result / noise - SPREAD).abs().max() < 0.03


@pytest.mark.parametrize("name", ANCESTRAL)
def test_ancestral_samplers_end_with_the_spread_of_the_data(name):
    _, result = draw(name, steps=200, seeds=range(4), shape=(4, 32, 32))
    assert abs(float(result.std()) - SPREAD) < 0.03 and abs(float(result.mean())) < 0.02


@pytest.mark.parametrize("name", BASIC)
def test_zero_terminal_snr_starts_at_the_last_step(name):
    for steps in (1,) if name in ("dpm_2", "dpm_2_a") else (1, 4, 30):  # those two are slow to set up
        scheduler = samplers.make_scheduler(name, prediction_type="v_prediction", steps=steps, schedule=ZERO_SNR)
        assert float(scheduler.timesteps[0]) == 999
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    assert samplers.make_scheduler(name, prediction_type="v_prediction", steps=30).alphas_cumprod[-1] > 1e-3


def test_what_cannot_start_from_noise_is_refused():
    def make(name, kind, steps):
        return samplers.make_scheduler(name, prediction_type=kind, steps=steps, schedule=ZERO_SNR)

    # pndm's Runge-Kutta start fails at pure noise, and a noise prediction says nothing there.
    # From there, spread sigmas would be nearly all of them noise.
    for name, kind, steps in (
        ("pndm", "v_prediction", 30),
        ("dpmsingle", "epsilon", 30),
        ("lcm", "epsilon", 4),
        ("ddim", "epsilon", 1),
        ("dpmpp_2m_karras", "v_prediction", 30),
        ("euler_exponential", "epsilon", 30),
    ):
        with pytest.raises(UserError, match=r"zero terminal SNR|pure noise"):
            make(name, kind, steps)
    for name in BASIC:
        if name in ("ddim", "euler", "dpmsolver++"):  # an epsilon model starts before the step that it cannot learn
            assert float(make(name, "epsilon", 30).timesteps[0]) < 999


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_rectified_flow_is_solved(name, shift):
    schedule = schedule_for("rectified_flow", flow_shift=shift)
    if name == "dpmpp_2m_sde":
        shape = {"seeds": range(4), "shape": (4, 32, 32)}
        _, result = draw(name, steps=200, kind="rectified_flow", schedule=schedule, **shape)
        assert abs(float(result.std()) - SPREAD) < 0.03 and abs(float(result.mean())) < 0.02
    else:
        noise, result = draw(name, steps=200, kind="rectified_flow", schedule=schedule)
        assert (result / noise - SPREAD).abs().max() < 0.02
    scheduler = samplers.make_scheduler(name, prediction_type="rectified_flow", steps=7, schedule=schedule)
    torch.testing.assert_close(scheduler.timesteps.double(), scheduler.sigmas[:-1].double() * 1000, rtol=1e-6, atol=0)
    with pytest.raises(UserError, match="eta"):
        samplers.make_scheduler(name, prediction_type="rectified_flow", steps=7, schedule=schedule, eta=0.5)
    even = torch.linspace(1, 1 / 7, 7)
    if name in ("euler", "ddim"):
        torch.testing.assert_close(scheduler.sigmas[:-1], shift * even / (1 + (shift - 1) * even))


def test_one_step_of_flow_is_the_mean_of_the_data():
    for name in FLOW_SAMPLERS:
        noise, result = draw(name, steps=1, kind="rectified_flow", schedule=schedule_for("rectified_flow"))
        assert result.abs().max() < 0.01 * noise.abs().max()


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(FLOW_SAMPLERS)))
def test_samplers_that_cannot_flow_are_refused_with_those_that_can(name):
    with pytest.raises(UserError) as caught:
        samplers.make_scheduler(name, prediction_type="rectified_flow", steps=30)
    assert name in str(caught.value) and "euler, k_euler, ddim, dpmsolver++, dpmsingle, dpmpp_2m" in str(caught.value)


class FlowEuler(diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' flow scheduler with the two members that the SDXL pipeline asks for, and evenly spaced sigmas."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample, timestep):
        return sample

    def set_timesteps(self, num_inference_steps, device=None):
        even = [1 - index / num_inference_steps for index in range(num_inference_steps)]
        super().set_timesteps(sigmas=even, device=device)


REQUEST = GenRequest(prompt="a red circle", seed=3, steps=6, scale=3.0, size=Size(64, 64), sampler="euler")


@pytest.fixture
def pipeline(bundle):
    """diffusers' own pipeline around the same modules; its scheduler is set by the test."""
    made = diffusers.StableDiffusionXLPipeline(
        vae=bundle.vae,
        text_encoder=bundle.text_encoder_1,
        text_encoder_2=bundle.text_encoder_2,
        tokenizer=None,
        tokenizer_2=None,
        unet=bundle.unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def pipeline_latents(pipeline, texts):
    """The final latents of REQUEST by diffusers' pipeline, from given embeddings and our start noise."""
    positive, negative = texts
    return pipeline(
        prompt_embeds=positive.hidden_BTD,
        pooled_prompt_embeds=positive.pooled_BP,
        negative_prompt_embeds=negative.hidden_BTD,
        negative_pooled_prompt_embeds=negative.pooled_BP,
        latents=samplers.start_noise([torch.Generator().manual_seed(REQUEST.seed)], (4, 8, 8)),
        width=64,
        height=64,
        num_inference_steps=REQUEST.steps,
        guidance_scale=REQUEST.scale,
        output_type="latent",
    ).images


def flow_by_folder(bundle, folder):
    """The scheduler that diffusers builds from a saved folder."""
    sdxl.save(bundle, folder, save_as="diffusers", dtype=torch.float16)
    return diffusers.DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler")


def trailing_euler(bundle, folder):
    """What diffusers documents for models with zero terminal SNR."""
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


@pytest.mark.parametrize(
    ("kind", "settings", "sampler", "scheduler", "atol"),
    [
        ("v_prediction", {"zero_terminal_snr": True}, "euler", trailing_euler, 1e-4),
        ("rectified_flow", {"flow_shift": 3.0}, "euler", lambda *_: FlowEuler(shift=3.0), 1e-5),
        # diffusers cuts this solver's timesteps to whole numbers, so the model is told a little less noise.
        ("rectified_flow", {"flow_shift": 3.0}, "dpmsolver++", flow_by_folder, 1e-2),
    ],
)
def test_latents_equal_those_of_the_diffusers_pipeline(
    bundle, pipeline, tmp_path, kind, settings, sampler, scheduler, atol
):
    conditioning = encode_requests(bundle, [REQUEST])
    kept = []
    bundle.set_prediction(kind, **settings)
    try:
        pipeline.scheduler = scheduler(bundle, tmp_path / "folder")
        theirs = pipeline_latents(pipeline, [conditioning.text(REQUEST, negative=flag) for flag in (False, True)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "decoded", lambda bundle, latents, at_once: kept.append(latents) or iter([None]))
            list(launch.generate(bundle, [replace(REQUEST, sampler=sampler)], conditioning=conditioning))
    finally:
        bundle.set_prediction("epsilon")
    assert float(kept[0].std()) > 0.1
    torch.testing.assert_close(kept[0], theirs, rtol=0, atol=atol)
