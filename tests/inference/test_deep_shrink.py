"""Deep Shrink against a U-Net that is walked by hand, and that nothing of it stays."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import sdxl_gen_img
from library.diffusion.conditioning import TextCond
from library.errors import UserError
from library.inference.deep_shrink import Shrinking, count_blocks
from library.inference.effects import Cells, DeepShrink, skip_sizes
from library.inference.followers import UNetCall
from library.inference.launch import generate
from library.inference.request import GenRequest
from library.models.families import sdxl
from library.sizes import Size

REQUEST = GenRequest(prompt="a red circle", size=Size(128, 128), steps=4, scale=3.0, seed=3, sampler="euler_a")
HALVES = [False, False, False, True, False, False, True, False, False]  # of SDXL


def by_hand(unet, x, t, text, sizes, settings: DeepShrink, residuals=None):
    """The original U-Net's loop (sd-scripts, sdxl_original_unet.py) on the blocks of diffusers, with its resizes."""
    added = {"text_embeds": text.pooled_BP, "time_ids": sizes}
    emb = unet.time_embedding(unet.time_proj(t).to(x.dtype))
    emb = emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=text.hidden_BTD, added_cond_kwargs=added)
    inputs, outputs = [[unet.conv_in]], []
    for level in unet.down_blocks:
        attentions = getattr(level, "attentions", [None] * len(level.resnets))
        inputs += [[part for part in pair if part] for pair in zip(level.resnets, attentions, strict=True)]
        inputs += [[part] for part in level.downsamplers or []]
    for level in unet.up_blocks:
        attentions = getattr(level, "attentions", [None] * len(level.resnets))
        blocks = [[part for part in pair if part] for pair in zip(level.resnets, attentions, strict=True)]
        blocks[-1] += level.upsamplers or []
        outputs += blocks
    mid = [unet.mid_block.resnets[0], unet.mid_block.attentions[0], unet.mid_block.resnets[1]]

    def call(modules, h):
        for module in modules:
            if type(module).__name__ == "ResnetBlock2D":
                h = module(h, emb)
            elif type(module).__name__ == "Transformer2DModel":
                h = module(h, encoder_hidden_states=text.hidden_BTD).sample
            else:
                h = module(h)
        return h

    def like(h, size):
        return F.interpolate(h, size=size, mode="bicubic", align_corners=False) if h.shape[-2:] != size else h

    h, skips = x, []
    for depth, modules in enumerate(inputs):
        first = settings.depth_1 == depth and t[0] >= settings.timesteps_1
        second = settings.depth_2 == depth and settings.timesteps_2 <= t[0] < settings.timesteps_1
        if first or second:
            h = F.interpolate(h, scale_factor=settings.ratio, mode="bicubic", align_corners=False)
        h = call(modules, h)
        skips.append(h)
    if residuals is not None:
        skips = [skip + like(more, skip.shape[-2:]) for skip, more in zip(skips, residuals[:-1], strict=True)]
    h = call(mid, h)
    h = h if residuals is None else h + like(residuals[-1], h.shape[-2:])
    for modules in outputs:
        h = like(h, skips[-1].shape[-2:])
        h = call(modules, torch.cat([h, skips.pop()], dim=1))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(like(h, x.shape[-2:]))))


@pytest.fixture(scope="module")
def conditions(bundle):
    g = torch.Generator().manual_seed(0)
    unet = bundle.unet
    text = TextCond(torch.randn(2, 77, 80, generator=g), torch.randn(2, 48, generator=g))
    assert unet.config.projection_class_embeddings_input_dim == 48 + 6 * 32
    return text, torch.tensor([[128.0, 96, 0, 0, 128, 96]] * 2)


def with_hooks(unet, x, t, text, sizes, settings, extra=None):
    request = replace(REQUEST, deep_shrink=settings)
    with torch.no_grad(), Shrinking(unet).on([request], calls=1, device=x.device) as before:
        call = UNetCall(0, 1, x, t, text, sizes, dict(extra or {}))
        before(call)
        return sdxl.predict(unet, x, t, text, sizes, **call.extra)


@pytest.mark.parametrize(
    ("settings", "size", "t"),
    [(DeepShrink(depth), (16, 24), 800) for depth in range(9)]
    + [
        (DeepShrink(3, ratio=0.7), (19, 30), 650),  # at the last timestep in range; sides that are no multiple of 4
        (DeepShrink(0, ratio=0.35), (21, 17), 900),
        (DeepShrink(4), (18, 22), 999),
        (DeepShrink(1, 700, 4, 300), (20, 16), 700),
        (DeepShrink(1, 700, 4, 300), (20, 16), 699),  # the second depth
        (DeepShrink(3, 700, 0, 300, 0.6), (20, 18), 300),  # back to the input's size for the head, too
    ],
)
def test_the_u_net_is_that_of_the_original_with_resizes(bundle, conditions, settings, size, t):
    unet, (text, sizes) = bundle.unet, conditions
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([t, t])
    with torch.no_grad():
        wanted = by_hand(unet, x, t, text, sizes, settings)
        plain = sdxl.predict(unet, x, t, text, sizes)
    got = with_hooks(unet, x, t, text, sizes, settings)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (got - plain).abs().mean() > 1e-4  # it does something; little in the coarse blocks of this model


def test_out_of_its_timesteps_nothing_changes_to_the_bit(bundle, conditions):
    unet, (text, sizes) = bundle.unet, conditions
    x = torch.randn(2, 4, 18, 16, generator=torch.Generator().manual_seed(1))
    for settings, t in ((DeepShrink(3), 649), (DeepShrink(3, 700, 1, 300), 299), (DeepShrink(3, 700), 300)):
        t = torch.tensor([t, t])
        with torch.no_grad():
            plain = sdxl.predict(unet, x, t, text, sizes)
        assert torch.equal(with_hooks(unet, x, t, text, sizes, settings), plain)


def test_residuals_of_control_nets_take_the_sizes_of_the_maps(bundle, conditions):
    unet, (text, sizes), g = bundle.unet, conditions, torch.Generator().manual_seed(2)
    x, t, settings = torch.randn(2, 4, 19, 16, generator=g), torch.tensor([800, 800]), DeepShrink(3)
    places = skip_sizes(Cells(19, 16), HALVES, depth=None, ratio=1)
    widths = [32, 32, 32, 32, 64, 64, 64, 80, 80, 80]
    shapes = zip(widths, [*places, places[-1]], strict=True)
    residuals = [torch.randn(2, width, *place, generator=g) for width, place in shapes]
    extra = {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}
    with torch.no_grad():
        wanted = by_hand(unet, x, t, text, sizes, settings, residuals)
    torch.testing.assert_close(with_hooks(unet, x, t, text, sizes, settings, extra), wanted, rtol=1e-5, atol=1e-5)


def test_half_precision_keeps_its_dtype(bundle, conditions):
    import copy

    unet, (text, sizes) = copy.deepcopy(bundle.unet).to(torch.bfloat16), conditions
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([800, 800])
    got = with_hooks(unet, x, t, text, sizes, DeepShrink(3))
    wanted = with_hooks(bundle.unet, x, t, text, sizes, DeepShrink(3))
    assert got.dtype == torch.bfloat16 and (got.float() - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def drawn(bundle, requests, **how):
    return [np.asarray(picture).astype(np.int16) for _, picture in generate(bundle, requests, **how)]


def hooks_of(unet) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


def test_a_picture_with_it_leaves_the_next_one_alone(bundle):
    shrunk, before = replace(REQUEST, deep_shrink=DeepShrink(3, ratio=0.6)), hooks_of(bundle.unet)
    a, b, again = drawn(bundle, [REQUEST, shrunk, REQUEST], batch_size=3)
    assert np.array_equal(a, again) and np.abs(a - b).mean() > 2
    assert hooks_of(bundle.unet) == before
    (alone,) = drawn(bundle, [shrunk])
    assert np.array_equal(alone, b)
    pair = drawn(bundle, [shrunk, replace(shrunk, seed=4)], batch_size=2)
    assert np.abs(pair[0] - b).max() <= 1, "the sums of a larger batch round otherwise"


def test_an_error_on_the_way_leaves_no_hook(bundle):
    before = hooks_of(bundle.unet)
    request = replace(REQUEST, deep_shrink=DeepShrink(3))
    with pytest.raises(ZeroDivisionError), Shrinking(bundle.unet).on([request], calls=1, device=torch.device("cpu")):
        assert hooks_of(bundle.unet) > before
        raise ZeroDivisionError
    assert hooks_of(bundle.unet) == before


def test_the_ranges_of_timesteps():
    one, two = DeepShrink(3), DeepShrink(3, 700, 5, 400)
    assert [one.depth_at(t) for t in (999, 650, 649.9, 0)] == [3, 3, None, None]
    assert [two.depth_at(t) for t in (700, 699, 400, 399)] == [3, 5, 5, None]
    assert DeepShrink().depth_at(999) is None and not DeepShrink(ratio=0.4).is_on and DeepShrink(0).is_on


def test_the_sizes_of_sdxls_maps(bundle):
    assert count_blocks(bundle.unet) == HALVES
    sizes = skip_sizes(Cells(128, 96), HALVES, depth=3, ratio=0.5)
    assert sizes == [(128, 96)] * 3 + [(32, 24)] * 3 + [(16, 12)] * 3
    assert skip_sizes(Cells(17, 9), HALVES, depth=4, ratio=0.4)[3:] == [(9, 5)] + [(3, 2)] * 2 + [(2, 1)] * 3


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([None, *range(9)]), st.floats(0.1, 0.99))
def test_sizes_are_those_of_convolutions_and_of_torch(h, w, depth, ratio):
    x = torch.empty(1, 1, h, w, device="meta")
    for block, (halves, size) in enumerate(zip(HALVES, skip_sizes(Cells(h, w), HALVES, depth=depth, ratio=ratio))):
        if block == depth:
            if min(int(h * ratio), int(w * ratio), *size) < 1:
                return
            x = F.interpolate(x, scale_factor=ratio, mode="nearest")
        if halves:
            x = F.conv2d(x, torch.empty(1, 1, 3, 3, device="meta"), stride=2, padding=1)
        h, w = x.shape[-2:]
        assert (h, w) == size


@pytest.mark.parametrize(
    ("settings", "size", "what"),
    [
        (DeepShrink(7, ratio=0.2), 64, "by 0.2 at depth 7 leaves nothing of 64x64"),
        (DeepShrink(9), 64, "this model has the depths 0 to 8"),
        (DeepShrink(3, 600, 4, 600), 64, "the second depth of Deep Shrink never acts"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_drawn(bundle, settings, size, what):
    with pytest.raises(UserError, match=what):
        next(generate(bundle, [replace(REQUEST, deep_shrink=settings, size=Size(size, size))]))


def test_settings_that_never_act_are_told(bundle, caplog):
    drawn(bundle, [replace(REQUEST, steps=1, size=Size(64, 64), deep_shrink=DeepShrink(3, 1000))])
    assert "Deep Shrink never acts" in caplog.text


def test_options_of_effects_that_no_prompt_has_are_told_once(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\na dog --dsd1 3 --dst1 1000\n")
    argv = f"--ckpt tiny --outdir {tmp_path} --steps 1 --W 64 --H 64 --from_file {tmp_path / 'prompts.txt'}".split()
    effects = ["--ds_ratio", "0.4", "--gradual_latent_ratio", "0.4", "--sampler", "euler_a"]
    assert sdxl_gen_img.main([*argv, *effects]) == 0
    told = capsys.readouterr().err
    assert "gradual_latent_ratio has no effect: no prompt has Gradual Latent" in told and "ds_ratio" not in told
    assert told.count("Deep Shrink never acts") == 1
