"""Gradual Latent: which size at which step, the step's maths, and that nothing of it stays."""

from dataclasses import replace
from itertools import pairwise

import cv2
import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sdxl_gen_img
from library.config.unsharp import Unsharp, parse_unsharp
from library.errors import UserError
from library.inference.effects import Cells, DeepShrink, GradualLatent
from library.inference.gradual_latent import GradualScheduler, sharpened
from library.inference.launch import generate
from library.inference.request import GenRequest, HighresFix
from library.inference.samplers import make_scheduler
from library.models.prediction import schedule_for
from library.sizes import Size

SETTINGS = GradualLatent(timesteps=950, every_n_steps=1)
REQUEST = GenRequest(
    prompt="a red circle", size=Size(128, 128), steps=6, scale=3.0, seed=3, sampler="euler_a", gradual_latent=SETTINGS
)
LEADING_10 = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]  # SDXL's timesteps of 10 steps


def test_which_size_at_which_step():
    full = Cells(128, 152)
    sizes = GradualLatent(650, every_n_steps=2).growth(full, LEADING_10)
    grown = {3: (80, 88), 5: (96, 112), 7: (112, 128), 9: (128, 152)}  # 0.625, 0.75, 0.875 rounded down to 8, then 1
    assert {step: size for step, size in enumerate(sizes) if size} == grown and len(sizes) == 10
    assert GradualLatent(650).start_size(full) == (64, 76)
    tenths = GradualLatent(1000, ratio=0.7, ratio_step=0.1, every_n_steps=1).growth(Cells(105, 131), LEADING_10)
    assert tenths[:4] == [(80, 104), (88, 112), (105, 131), None]  # 0.7 + 3 x 0.1 is 1, and the end is no multiple of 8
    assert GradualLatent(701, every_n_steps=9).growth(full, LEADING_10)[2:5] == [None, (80, 88), None]  # below, not at
    assert not any(GradualLatent(1).growth(full, LEADING_10))
    small = GradualLatent(999, ratio=0.9, ratio_step=0.01, every_n_steps=1).growth(Cells(19, 9), LEADING_10)
    assert small == [(17, 8)] * 9 + [(19, 9)]  # never smaller than before


@given(
    st.floats(0.1, 0.95), st.floats(0.01, 1), st.integers(1, 5), st.integers(1, 1000), st.integers(8, 200),
    st.integers(8, 200), st.integers(1, 60),
)  # fmt: skip
def test_sizes_only_grow_and_end_at_most_at_the_whole(ratio, ratio_step, every, begins, h, w, steps):
    settings = GradualLatent(begins, ratio, ratio_step, every)
    timesteps = np.linspace(999, 1, steps).tolist()
    sizes = settings.growth(Cells(h, w), timesteps)
    changes = [step for step, size in enumerate(sizes) if size is not None]
    assert all(later - earlier >= every for earlier, later in pairwise(changes))
    assert all(timesteps[step] < begins for step in changes)
    path = [settings.start_size(Cells(h, w)), *(size for size in sizes if size is not None)]
    for old, new in pairwise(path):
        assert old.h <= new.h <= h and old.w <= new.w <= w
    reached = len(changes) * ratio_step + ratio
    if abs(reached - 1) > 1e-4:
        assert (path[-1] == (h, w)) or reached < 1


@pytest.mark.parametrize("ksize,sigma,strength", [(3, 0.5, 0.5), (7, 1.3, 2.0), (5, 3.0, 1.0)])
def test_sharpening_is_an_unsharp_mask_as_in_opencv(ksize, sigma, strength):
    x = torch.randn(2, 4, 9, 12, generator=torch.Generator().manual_seed(0))
    got = sharpened(x, Unsharp(ksize, sigma, strength)).numpy()
    for picture, wanted in zip(got.reshape(-1, 9, 12), x.numpy().reshape(-1, 9, 12), strict=True):
        blurred = cv2.GaussianBlur(wanted, (ksize, ksize), sigma, borderType=cv2.BORDER_REFLECT_101)
        np.testing.assert_allclose(picture, wanted + strength * (wanted - blurred), atol=1e-5)


def reference(settings, kind, noise, predict, steps):
    """gen_img.md section 12, written down with diffusers' sigmas alone. Noise: the corner of a draw at full size."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    euler = diffusers.EulerDiscreteScheduler(**betas)
    euler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(7)
    full, unsharp = noise.shape[-2:], settings.unsharp

    def to(x, size):
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False)

    x = F.interpolate(noise * euler.init_noise_sigma, scale_factor=settings.ratio, mode="bicubic", align_corners=False)
    x, ratio, elapsed = sharpened(x, unsharp), settings.ratio, 1000
    for i, t in enumerate(euler.timesteps):
        size = None
        if t < settings.timesteps and ratio < 1 and elapsed >= settings.every_n_steps:
            ratio, elapsed = min(ratio + settings.ratio_step, 1.0), 0
            size = tuple(int(side * ratio) // 8 * 8 for side in full)
        elapsed += 1
        here, there = euler.sigmas[i : i + 2]
        output = predict(x / (here**2 + 1) ** 0.5, t)
        x0 = x - here * output
        if kind == "v_prediction":
            x0 = output * (-here / (here**2 + 1) ** 0.5) + x / (here**2 + 1)
        up = (there**2 * (here**2 - there**2) / here**2) ** 0.5
        slope, dt = (x - x0) / here, (there**2 - up**2) ** 0.5 - here
        s_noise = settings.s_noise if size else 1.0
        if size is None:
            x = x + slope * dt
        elif unsharp is None or unsharp.target_x:
            x = sharpened(to(x + slope * dt, size), unsharp)
        else:
            x = sharpened(to(x, size), unsharp) + to(slope, size) * dt
        drawn = torch.randn((1, 4, *full), generator=generator)
        x = x + drawn[..., : x.shape[2], : x.shape[3]] * up * s_noise
    return x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "settings",
    [
        GradualLatent(700, every_n_steps=2),
        GradualLatent(900, 0.25, 0.25, 2, 0.6, Unsharp(3, 0.5, 0.5)),
        GradualLatent(700, 0.5, 0.25, 3, 1.3, Unsharp(5, 1.0, 0.4, target_x=False)),
    ],
)
def test_steps_are_those_of_the_method(kind, settings):
    noise = torch.randn(1, 4, 64, 48, generator=torch.Generator().manual_seed(0))

    def predict(x, t):
        return torch.tanh(x * (1 + t / 1000)) * 0.9

    scheduler = GradualScheduler(
        make_scheduler("euler_a", prediction_type=kind, steps=12), settings, full=Cells(64, 48)
    )
    latents, generators = scheduler.begin(noise) * scheduler.init_noise_sigma, [torch.Generator().manual_seed(7)]
    seen = set()
    for t in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents, generator=generators).prev_sample
        seen.add(tuple(latents.shape[-2:]))
    assert len(seen) > 2 and latents.shape[-2:] == (64, 48)
    torch.testing.assert_close(latents, reference(settings, kind, noise, predict, 12), rtol=1e-4, atol=1e-4)


def drawn(bundle, requests, **how):
    return [np.asarray(picture).astype(np.int16) for _, picture in generate(bundle, requests, **how)]


def test_a_picture_with_it_leaves_the_next_one_alone_and_does_not_depend_on_its_batch(bundle):
    plain = replace(REQUEST, gradual_latent=GradualLatent())
    both = replace(REQUEST, deep_shrink=DeepShrink(3), negative_scale=1.5)
    a, b, c, again = drawn(bundle, [plain, REQUEST, both, plain])
    assert a.shape == b.shape == (128, 128, 3) and np.array_equal(a, again)
    assert np.abs(a - b).mean() > 2 and np.abs(b - c).mean() > 1
    pair = [REQUEST, replace(REQUEST, seed=4)]
    forward, backward = (drawn(bundle, requests, batch_size=2) for requests in (pair, pair[::-1]))
    assert np.array_equal(forward[0], backward[1]) and np.abs(forward[0] - b).max() <= 1


def test_models_with_zero_terminal_snr_can_be_drawn(bundle):
    model = replace(
        bundle, prediction_type="v_prediction", schedule=schedule_for("v_prediction", zero_terminal_snr=True)
    )
    (picture,) = drawn(model, [replace(REQUEST, sampler="k_euler_a")])
    assert picture.shape == (128, 128, 3) and picture.std() > 0


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sampler": "euler"}, "is for euler_a, not for euler"),
        ({"steps": 4}, "comes to 64x64 pixels, not to 128x128"),
        ({"gradual_latent": GradualLatent(1)}, "comes to 64x64 pixels"),
        ({"image": "x.png"}, "cannot draw over a picture"),
        ({"gradual_latent": replace(SETTINGS, ratio=0.01)}, "0.01 of a picture of 128x128 is too small"),
        ({"gradual_latent": replace(SETTINGS, ratio=0.2, unsharp=Unsharp(9, 1, 1))}, "too small to start from"),
        ({"deep_shrink": DeepShrink(8, ratio=0.4)}, "leaves nothing of"),  # of the small picture at the start
    ],
)
def test_what_cannot_be_is_told_before_anything_is_drawn(bundle, changes, what):
    with pytest.raises(UserError) as caught:
        next(generate(bundle, [replace(REQUEST, **changes)]))
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "3", "3,0.5", "4,1,1", "1,1,1", "17,1,1", "3,0,1", "3,1,nan", "3,1,1,x", "1e999,1,1"]
)
def test_unsharp_parameters_that_cannot_be_are_refused(text):
    with pytest.raises(ValueError, match="must"):
        parse_unsharp(text)


def test_unsharp_parameters():
    assert parse_unsharp("3, 0.5,0.25") == Unsharp(3, 0.5, 0.25, True)
    assert parse_unsharp("5,1,2,0") == Unsharp(5, 1.0, 2.0, False)


def test_only_the_smaller_of_two_pictures_grows(bundle):
    two = replace(
        REQUEST, highres=HighresFix(0.5, steps=4, save_first=True), gradual_latent=GradualLatent(999, 0.5, 0.5)
    )
    small, whole = drawn(bundle, [two])
    plain_small, plain_whole = drawn(bundle, [replace(two, gradual_latent=GradualLatent())])
    assert small.shape == (64, 64, 3) and whole.shape == (128, 128, 3)
    assert np.abs(small - plain_small).mean() > 1 and np.abs(whole - plain_whole).mean() > 0.1
    with pytest.raises(UserError, match="of a picture of 64x64 is too small"):
        next(generate(bundle, [replace(two, gradual_latent=GradualLatent(999, 0.1))]))


def test_options_of_a_line_reach_its_pictures_alone(tmp_path):
    lines = ["red --d 3", "red --d 3 --dsd1 2 --dst1 300", "red --d 3 --gle 1 --glr 0.25 --gls 0.75", "red --d 3"]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    options = f"--ckpt tiny --sampler euler_a --steps 3 --W 64 --H 64 --batch_size 4 --from_file {tmp_path / 'p.txt'}"
    out = ["--outdir", str(tmp_path), "--sequential_file_name", "--ds_ratio", "0.6", "--gradual_latent_s_noise", "0.5"]
    assert sdxl_gen_img.main([*options.split(), *out]) == 0
    first, shrunk, grown, last = (
        np.asarray(Image.open(tmp_path / f"im_00000{number}.png")).astype(int) for number in (1, 2, 3, 4)
    )
    assert np.array_equal(first, last)
    assert np.abs(first - shrunk).mean() > 1 and np.abs(first - grown).mean() > 1
