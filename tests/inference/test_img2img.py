"""Drawing over pictures and under masks."""

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from library.config.choices import SAMPLERS
from library.errors import UserError
from library.inference import img2img
from library.inference.denoise import denoise
from library.inference.img2img import Init, init_noise
from library.inference.launch import generate
from library.inference.request import GenRequest
from library.inference.samplers import make_scheduler, start_noise
from library.inference.source_pictures import init_latents, latents_of, picture_pixels, with_sources
from library.inference.stage import draws_per_step
from library.sizes import Size

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers

SHAPE = (4, 6, 8)
NOISY = ("euler_a", "k_euler_a", "dpm_2_a", "k_dpm_2_a", "dpmpp_sde", "dpmpp_2m_sde", "lcm")
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
REQUEST = GenRequest(
    prompt="a red circle on a blue background", negative="green", size=Size(64, 64), steps=6, scale=5.0, seed=1
)
LIMIT, LIMIT_KARRAS = 0.02, 0.4  # of 255, on average; see test_sampler_parity.py


@pytest.fixture
def photo(tmp_path):
    """A picture of four colours, twice the size that is drawn, and a mask whose right half is white."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    Image.fromarray(colours.repeat(64, 0).repeat(64, 1)).save(tmp_path / "photo.png")
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


@pytest.mark.parametrize("skipped", [0, 1, 3, 6])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.startswith(NOISY)])
def test_the_noise_at_the_start_is_that_of_the_timestep(sampler, kind, skipped):
    """Whoever predicts the very noise that was added gets the picture back, if the two agree on its amount."""
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, *SHAPE, generator=g), torch.randn(2, *SHAPE, generator=g)
    scheduler = make_scheduler(sampler, prediction_type=kind, steps=7)
    log_snr = (scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())).log()
    calls = []

    def predict(x, t):
        calls.append(float(t))
        between = np.interp(float(t), np.arange(1000), log_snr.numpy())
        signal = math.sqrt(1 / (1 + math.exp(-between)))
        return noise if kind == "epsilon" else signal * noise - math.sqrt(1 - signal**2) * x0

    mask = torch.zeros(2, 1, *SHAPE[1:])
    mask[:, :, :, 4:] = 1
    init = Init(x0, noise, skipped, mask if skipped == 3 else None)
    start = noise if not skipped else torch.randn(2, *SHAPE, generator=g)  # where it must not matter
    drawn = denoise(predict, start, scheduler, generators=[], init=init)
    first = make_scheduler(sampler, prediction_type=kind, steps=7)
    assert len(calls) == img2img.num_timesteps(first, skipped)
    assert calls[0] == float(img2img.begin_at(first, skipped)[0])
    # These two end at the smallest trained sigma, whose noise they leave.
    left = 0.0292 if sampler.startswith(("pndm", "dpmsolver")) and sampler != "dpmsolver++" else 0.0
    if init.mask_B1hw is not None:
        assert torch.equal(drawn[..., :4], x0[..., :4]), "what stays is the picture itself"
        drawn, x0, noise = drawn[..., 4:], x0[..., 4:], noise[..., 4:]
    torch.testing.assert_close(drawn, x0 + left * noise, atol=5e-3, rtol=0)


def test_the_noise_of_pictures_that_are_drawn_over_follows_sd_scripts_rule():
    """torch.manual_seed(seed); start noise, then one draw for each step (two for dpm_2_a), then this one."""
    torch.manual_seed(5)
    start = torch.randn(SHAPE)
    for _ in range(12):
        later = torch.randn(SHAPE)
    wanted = torch.randn(SHAPE)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(start_noise([generator], SHAPE)[0], start)
    before = generator.get_state()
    for sampler, steps in (("euler_a", 12), ("dpm_2_a", 6), ("dpm_2", 12)):
        draws = steps * draws_per_step(sampler)
        assert torch.equal(init_noise([generator], SHAPE, draws_before=draws)[0], wanted)
    assert torch.equal(generator.get_state(), before) and not torch.equal(later, wanted)


MULTISTEP = diffusers.DPMSolverMultistepScheduler
CASES = [
    ("ddim", lambda: diffusers.DDIMScheduler(**SDXL, clip_sample=False, steps_offset=1)),
    ("euler", lambda: diffusers.EulerDiscreteScheduler(**SDXL)),
    ("euler_a", lambda: diffusers.EulerAncestralDiscreteScheduler(**SDXL)),
    ("heun", lambda: diffusers.HeunDiscreteScheduler(**SDXL)),
    ("dpmpp_2m_karras", lambda: MULTISTEP(**SDXL, use_karras_sigmas=True)),
    ("dpmpp_2m_sde", lambda: MULTISTEP(**SDXL, algorithm_type="sde-dpmsolver++")),
    ("dpmsingle", lambda: diffusers.DPMSolverSinglestepScheduler(**SDXL)),
    ("unipc", lambda: diffusers.UniPCMultistepScheduler(**SDXL)),
]


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("masked", [False, True], ids=["img2img", "inpaint"])
@pytest.mark.parametrize(("sampler", "scheduler"), CASES, ids=[name for name, _ in CASES])
def test_the_same_picture_as_diffusers_pipelines(
    bundle, pipeline, photo, monkeypatch, sampler, scheduler, masked, strength
):
    request = replace(REQUEST, sampler=sampler, strength=strength, image=str(photo / "photo.png"))
    request = replace(request, mask=str(photo / "mask.png")) if masked else request
    ((_, picture),) = generate(bundle, [request])
    shape = (4, 8, 8)
    noise = start_noise([torch.Generator().manual_seed(request.seed)], shape)
    kinds = diffusers.StableDiffusionXLImg2ImgPipeline, diffusers.StableDiffusionXLInpaintPipeline
    theirs = kinds[masked](**{**pipeline.components, "scheduler": scheduler()})
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(request.seed)
    torch.randn(shape, generator=generator)
    # Where a mask starts from noise alone, it is the start noise; else the noise that follows the draws of all steps.
    over = init_noise([generator], shape, draws_before=request.steps)
    module = kinds[masked].__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: noise if masked and strength == 1 else over)
    monkeypatch.setattr(f"{module}.retrieve_latents", lambda output, **_: output.latent_dist.mode())
    mask = {"mask_image": Image.open(photo / "mask.png").resize((64, 64), Image.Resampling.NEAREST)} if masked else {}
    wanted = theirs(
        prompt=request.prompt,
        negative_prompt=request.negative,
        image=Image.open(photo / "photo.png").resize((64, 64), Image.Resampling.LANCZOS),
        num_inference_steps=request.steps,
        guidance_scale=request.scale,
        strength=strength,
        generator=generator,
        output_type="np",
        **({"width": 64, "height": 64} if masked else {}),
        **mask,
    ).images[0]
    ours = np.asarray(picture).astype(float)
    difference = float(np.abs(ours - (wanted * 255).round()).mean())
    assert difference < (LIMIT_KARRAS if sampler.endswith("karras") else LIMIT)
    assert ours.std() > 10


def test_each_picture_takes_the_next_image_and_its_shape(tmp_path):
    for name, size in (("a", (100, 70)), ("b", (64, 200)), ("mask", (10, 10))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    a, b, mask = (str(tmp_path / f"{name}.png") for name in ("a", "b", "mask"))
    opened = [Size(0, 0), Size(0, 0), Size(320, 0), Size(0, 320), Size(256, 512)]
    requests = with_sources([replace(REQUEST, size=size) for size in opened], [a, b], [mask], start=1)
    assert [request.image for request in requests] == [b, a, b, a, b]
    assert {request.mask for request in requests} == {mask}
    assert [tuple(request.size) for request in requests] == [(64, 192), (96, 64), (320, 1000), (456, 320), (256, 512)]
    assert with_sources([REQUEST], []) == [REQUEST]


def test_a_batch_draws_each_of_its_pictures_over_its_own_image(bundle, photo):
    Image.new("RGB", (64, 64), (0, 200, 0)).save(photo / "green.png")
    images = [str(photo / "photo.png"), str(photo / "green.png")]
    requests = [replace(REQUEST, image=image, strength=0.34, steps=3, seed=seed)
                for seed, image in enumerate(images)]  # fmt: skip
    plain = replace(REQUEST, steps=3)
    alone = [np.asarray(picture).astype(int) for _, picture in generate(bundle, [requests[0], plain, requests[1]])]
    both = [np.asarray(picture).astype(int) for _, picture in generate(bundle, requests, batch_size=2)]
    for one, other in zip((alone[0], alone[2]), both, strict=True):
        assert np.abs(one - other).max() <= 1, "the sums of a larger batch round otherwise"
    # A third of the steps leaves most of each image; what was drawn between them without one left nothing behind.
    known = Image.open(images[1]).convert("RGB")
    assert np.abs(both[1] - np.asarray(known).astype(int)).mean() < 40 < np.abs(both[0] - np.asarray(known)).mean()
    from_memory = replace(requests[1], image=known)
    assert np.array_equal(np.asarray(next(generate(bundle, [from_memory]))[1]), alone[2])


def test_outside_the_mask_the_picture_is_what_the_vae_makes_of_it(bundle, photo):
    request = replace(REQUEST, image=str(photo / "photo.png"), mask=str(photo / "mask.png"), strength=1.0)
    latents, mask = init_latents(bundle, [request])
    assert mask.shape == (1, 1, 8, 8) and mask[..., 4:].min() == 1 and mask[..., :4].max() == 0
    torch.testing.assert_close(latents, latents_of(bundle, picture_pixels(request.image, request.size)[None]))
    from library.inference.decoding import decoded

    ((_, picture),) = generate(bundle, [request])
    (kept,) = decoded(bundle, latents, 1)
    difference = np.abs(np.asarray(picture).astype(int) - np.asarray(kept).astype(int)).mean(axis=(0, 2))
    # The VAE normalises whole pictures, so the new half changes the colours of the old one a little.
    assert 3 * difference[:16].mean() < difference[40:].mean()


def test_what_leaves_no_step_is_refused(bundle, photo):
    request = replace(REQUEST, image=str(photo / "photo.png"), strength=0.1)
    with pytest.raises(UserError, match=r"strength 0.1 of 6 steps is less than one step"):
        list(generate(bundle, [request]))
