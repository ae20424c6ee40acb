"""Drawing in two sizes."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.inference import highres
from library.inference.highres import enlarged, first_stage, load_upscaler, second_stage
from library.inference.launch import generate, num_steps
from library.inference.request import GenRequest, HighresFix
from library.sizes import Size

REQUEST = GenRequest(prompt="a red circle on a blue background", size=Size(192, 128), steps=4, scale=3.0, seed=7)
HALF = HighresFix(0.5, steps=3)


def test_the_smaller_picture_is_asked_for_as_sd_scripts_does():
    request = replace(
        REQUEST, size=Size(1000, 1536), original_width=2001, crop_top=11, original_height_negative=30, strength=0.4,
        highres=replace(HALF, strength=0.9),
    )  # fmt: skip
    small = first_stage(request)
    assert small.size == Size(480, 768), "int(1000 * 0.5 + 0.5) // 32 * 32"
    assert (small.original_width, small.original_height, small.original_height_negative) == (1001, None, 15)
    assert (small.crop_top, small.crop_left, small.steps, small.strength, small.stage) == (6, None, 3, 0.9, "0")
    assert first_stage(replace(request, highres=HALF)).strength == 0.4
    whole = second_stage(replace(request, control=("a",)))
    assert (whole.seed, whole.size, whole.steps, whole.stage, whole.control) == (8, request.size, 4, "1", ("a",))
    assert second_stage(replace(request, control=("a",), highres=replace(HALF, without_control=True))).control == ()
    assert num_steps(request) == 3 + 1 and num_steps(replace(request, image="a")) == 2 + 1


def test_two_sizes_are_the_two_drawings_one_after_the_other(bundle):
    request = replace(REQUEST, highres=replace(HALF, save_first=True), strength=0.5)
    (small, first), (whole, second) = generate(bundle, [request])
    assert (first.size, second.size) == ((96, 64), (192, 128))
    assert (small.stage, whole.stage, small.seed, whole.seed) == ("0", "1", 7, 7)
    alone = replace(REQUEST, size=Size(96, 64), steps=3)
    assert np.array_equal(first, next(generate(bundle, [alone]))[1])
    over = replace(REQUEST, seed=8, strength=0.5, image=first)
    assert np.array_equal(second, next(generate(bundle, [over]))[1])
    quiet = [picture for _, picture in generate(bundle, [replace(request, highres=HALF), REQUEST])]
    assert np.array_equal(quiet[0], second), "keeping the smaller picture changes nothing"
    assert np.array_equal(quiet[1], next(generate(bundle, [REQUEST]))[1]), "and nothing of it is left behind"


def test_latents_are_enlarged_bilinearly(bundle):
    latents = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    larger = enlarged(bundle, latents, Size(128, 64), replace(HALF, latents=True), vae_batch_size=1)
    assert larger.shape == (2, 4, 8, 16)
    # Half-way cells of a doubled row weigh 3/4 and 1/4, away from the edges.
    row = 0.75 * latents[..., 0, :] + 0.25 * latents[..., 1, :]
    torch.testing.assert_close(larger[..., 1, 1:-1:2], 0.75 * row[..., :-1] + 0.25 * row[..., 1:])


UPSCALER = """
class Upscaler:
    def __init__(self, kind="latents", factor="1"):
        self.kind, self.factor = kind, float(factor)

    def support_latents(self):
        return self.kind == "latents"

    def upscale(self, vae, lowreso_images, lowreso_latents, dtype, width, height, batch_size=1, vae_batch_size=1):
        import torch
        if self.kind == "latents":
            assert lowreso_images is None and batch_size == len(lowreso_latents)
            h, w = height // 8, width // 8
            return self.factor * torch.nn.functional.interpolate(lowreso_latents, (h, w), mode="nearest")
        assert lowreso_latents is None
        larger = [picture.resize((width, height)) for picture in lowreso_images]
        return larger if self.kind == "pictures" else larger[1:]


def create_upscaler(**arguments):
    return Upscaler(**arguments)
"""


def test_an_upscaler_module_enlarges_what_it_asks_for(bundle, tmp_path, monkeypatch):
    (tmp_path / "my_upscaler.py").write_text(UPSCALER)
    monkeypatch.syspath_prepend(tmp_path)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for kind in ("latents", "pictures"):
        how = replace(HALF, upscaler=load_upscaler("my_upscaler", {"kind": kind, "factor": "2"}))
        sizes[kind] = enlarged(bundle, latents, Size(64, 64), how, vae_batch_size=1)
        assert sizes[kind].shape == (2, 4, 8, 8)
    assert torch.equal(sizes["latents"][..., ::2, ::2], 2 * latents)
    assert not torch.allclose(sizes["pictures"], sizes["latents"], atol=0.1)
    with pytest.raises(UserError, match="gave neither latents nor one picture for each"):
        enlarged(bundle, latents, Size(64, 64), replace(HALF, upscaler=load_upscaler("my_upscaler", {"kind": "bad"})),
                 vae_batch_size=1)  # fmt: skip
    wrong = replace(HALF, upscaler=load_upscaler("my_upscaler", {}))
    monkeypatch.setattr(sys.modules["my_upscaler"].Upscaler, "upscale", lambda *_, **__: latents)
    with pytest.raises(UserError, match=r"latents of shape \(2, 4, 4, 4\) where \(2, 4, 8, 8\)"):
        enlarged(bundle, latents, Size(64, 64), wrong, vae_batch_size=1)


class InPlace:
    """An upscaler that works on what it is given."""

    def support_latents(self):
        return True

    def upscale(self, vae, images, latents, dtype, width, height, **_):
        return latents.mul_(0.0).repeat(1, 1, 2, 2)


def test_an_upscaler_may_change_latents_in_place(bundle):
    kept = replace(REQUEST, highres=replace(HALF, save_first=True))
    changed = replace(kept, highres=replace(kept.highres, upscaler=InPlace()))
    (small, whole), (same, other) = (
        [picture.tobytes() for _, picture in generate(bundle, [request])] for request in (kept, changed)
    )
    assert small == same and whole != other


def test_modules_that_are_no_upscalers_are_named(tmp_path, monkeypatch):
    (tmp_path / "nothing_here.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="has no function create_upscaler"):
        load_upscaler("nothing_here", {})
    with pytest.raises(UserError, match="cannot be imported"):
        load_upscaler("nothing_there", {})


def test_under_a_mask_the_whole_picture_keeps_what_was_there(bundle, tmp_path):
    Image.new("RGB", (192, 128), (200, 30, 30)).save(tmp_path / "red.png")
    mask = np.zeros((128, 192), np.uint8)
    mask[:, 96:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    request = replace(
        REQUEST, highres=HALF, image=str(tmp_path / "red.png"), mask=str(tmp_path / "mask.png"), strength=0.75
    )
    seen = []
    original = highres.enlarged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("library.inference.launch.enlarged", lambda *a, **k: seen.append(1) or original(*a, **k))
        ((_, picture),) = generate(bundle, [request])
    pixels = np.asarray(picture).astype(int)
    away = np.abs(pixels - [200, 30, 30]).mean(axis=(0, 2))
    assert seen and 3 * away[:64].mean() < away[128:].mean()
