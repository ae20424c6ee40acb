"""Guidance: closed forms, diffusers' rescaling, and what the options of it do to pictures of the tiny model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

from library.diffusion.conditioning import TextCond
from library.inference import decoding
from library.inference.guidance import Branch, Guidance, guided
from library.inference.launch import encode_requests, generate
from library.inference.request import GenRequest
from library.inference.texts import TextForm
from library.sizes import Size

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and NumPy 2

REQUEST = GenRequest(prompt="a red circle", negative="green", size=Size(64, 64), steps=3, scale=5.0, seed=2)


@pytest.fixture
def predictions():
    """(positive, negative, neutral), each (3, 4, 8, 8), of different spreads."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 8, 8, generator=g) * (1 + index) + index for index in range(3)]


def test_plain_guidance_and_a_scale_of_its_own_for_the_negative_prompt(predictions):
    p, n, u = predictions
    torch.testing.assert_close(Guidance(5.0).combine(p, n), -4 * n + 5 * p)
    torch.testing.assert_close(Guidance(5.0, 2.0).combine(p, n, u), 5 * p - 2 * n - 2 * u)
    torch.testing.assert_close(Guidance(1.0).combine(p, n), p)


def test_a_negative_scale_one_below_the_scale_is_plain_guidance(predictions):
    p, n, u = predictions
    torch.testing.assert_close(Guidance(5.0, 4.0).combine(p, n, u), Guidance(5.0).combine(p, n), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_equals_diffusers_and_works_picture_by_picture(predictions, rescale):
    p, n, _ = predictions
    plain, rescaled = Guidance(7.0).combine(p, n), Guidance(7.0, rescale=rescale).combine(p, n)
    torch.testing.assert_close(rescaled, rescale_noise_cfg(plain, p, guidance_rescale=rescale))
    for row in range(3):
        alone = Guidance(7.0, rescale=rescale).combine(p[row : row + 1], n[row : row + 1])
        assert torch.equal(alone[0], rescaled[row])
    if rescale == 1.0:  # the deviation is that of the prompt's own prediction
        torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), p.std(dim=(1, 2, 3)))


def test_every_branch_is_told_its_own_text_and_sizes():
    """The model answers with what it was told, so the result shows which branch had what."""

    def branch(value, size):
        return Branch(TextCond(torch.full((2, 1, 1), value), torch.zeros(2, 1)), torch.full((2, 6), size))

    def model(x, t_B, text, sizes_B6):
        assert len(x) == len(t_B) == len(text.hidden_BTD) == len(sizes_B6)
        return x * 0 + (text.hidden_BTD[:, :, 0] + sizes_B6[:, :1])[:, :, None, None]

    predict = guided(
        model,
        positive=branch(1.0, 10.0),
        negative=branch(2.0, 20.0),
        neutral=branch(4.0, 40.0),
        guidance=Guidance(3.0, 2.0),
    )
    wanted = 44.0 + 3 * (11.0 - 44.0) - 2 * (22.0 - 44.0)
    assert torch.equal(predict(torch.zeros(2, 4, 8, 8), torch.tensor(5)), torch.full((2, 4, 8, 8), wanted))


@pytest.fixture
def latents(bundle, monkeypatch):
    """A function from requests to their final latents, one row each."""

    def draw(requests, **how):
        kept = []
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "decoded", lambda b, rows, n: kept.append(rows) or iter([None] * len(rows)))
            list(generate(bundle, requests, **how))
        return torch.cat(kept)

    return draw


def test_negative_scales_of_the_tiny_model(latents):
    plain, same, less = latents([replace(REQUEST, negative_scale=scale) for scale in (None, 4.0, 1.0)])
    torch.testing.assert_close(same, plain, atol=1e-3, rtol=1e-3)
    assert (less - plain).abs().mean() > 0.02
    empty = replace(REQUEST, negative="", original_width_negative=32)
    plain, with_scale = latents([empty, replace(empty, negative_scale=3.0)])
    torch.testing.assert_close(with_scale, plain, atol=1e-3, rtol=1e-3)
    unguided = replace(REQUEST, scale=1.0)
    assert torch.equal(*latents([unguided, replace(unguided, negative_scale=3.0, guidance_rescale=0.5)]))


def test_long_prompts_with_a_negative_scale_have_branches_of_one_length(bundle, latents):
    request = replace(REQUEST, negative_scale=2.0, steps=1, negative="green, " * 60)
    form = TextForm("generate", 3)
    conditioning = encode_requests(bundle, [request, replace(request, negative_scale=None)], text_form=form)
    lengths = {len(rows.hidden_BTD[0]) for rows in (conditioning.text(request), conditioning.neutral(request))}
    assert lengths == {2 * 77}
    assert torch.isfinite(latents([request], conditioning=conditioning)).all()


def test_settings_of_one_picture_do_not_leak_into_the_next(bundle):
    """A, then B with everything else, then A again, in one run and in batches of two."""
    other = replace(REQUEST, sampler="dpmpp_sde_karras", eta=0.5, negative_scale=2.0, guidance_rescale=0.7)
    drawn = [np.asarray(picture) for _, picture in generate(bundle, [REQUEST, other, REQUEST], batch_size=2)]
    assert np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[0], drawn[1])
