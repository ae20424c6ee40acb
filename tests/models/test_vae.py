"""Latents: scale, noise, overflow, slices and tiles."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from library.models.bundle import ModelBundle
from library.models.families import sdxl
from library.models.memory import configure_vae
from library.models.vae import _tile_starts


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Two smooth pictures of 160 x 192, (2, 3, 160, 192) in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(160.0), torch.arange(192.0), indexing="ij")
    disc = ((x - 90) ** 2 + (y - 70) ** 2 < 1600).float() * 1.6 - 0.8
    one = torch.stack([torch.sin(x / 20), torch.cos(y / 30), disc])
    return torch.stack([one, one.flip(-1)])


@pytest.fixture(scope="module")
def small(pictures: Tensor) -> Tensor:
    """Cuts of 32 x 32: float16 convolutions are slow on a CPU."""
    return pictures[:, :, 64:96, 64:96]


@pytest.fixture
def vae(fresh_bundle: ModelBundle) -> nn.Module:
    return fresh_bundle.vae


def _assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_encoding_is_diffusers_posterior(vae, pictures: Tensor):
    posterior = vae.encode(pictures).latent_dist
    _assert_near(sdxl.encode_image(vae, pictures), posterior.mean)
    noise = torch.randn(2, 4, 20, 24, generator=torch.Generator().manual_seed(1))
    expected = posterior.mean + posterior.std * noise
    _assert_near(sdxl.encode_image(vae, pictures, noise), expected)
    assert (posterior.std * noise).abs().max() > 1e-3


def test_decoding_inverts_encoding_without_any_scaling(vae, pictures: Tensor):
    latents = sdxl.encode_image(vae, pictures)
    decoded = sdxl.decode_latents(vae, latents)
    _assert_near(decoded, vae.decode(latents).sample)
    assert (
        (decoded - pictures).abs().mean() < 0.1 < (sdxl.decode_latents(vae, latents * 0.13025) - pictures).abs().mean()
    )


def test_latents_times_the_factor_have_unit_scale(vae, bundle: ModelBundle, pictures: Tensor):
    assert 0.3 < (sdxl.encode_image(vae, pictures) * bundle.scaling_factor).std() < 3


def _overflow_in_half(module: nn.Module, *, row: int) -> None:
    """Make `module` give infinity for one row whenever it runs in float16, as SDXL's VAE does for some pictures."""

    def hook(_module: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        if out.dtype == torch.float16:
            out[row % len(out)] *= float("inf")
        return out

    module.register_forward_hook(hook)


@torch.inference_mode()
def test_a_row_that_overflows_is_encoded_in_float32(vae, small: Tensor, caplog: pytest.LogCaptureFixture):
    expected = sdxl.encode_image(vae, small)
    _overflow_in_half(vae.encoder.mid_block, row=1)
    latents = sdxl.encode_image(vae.to(torch.float16), small)
    assert latents.dtype == torch.float32 and sdxl.rows_not_finite(latents) == []
    torch.testing.assert_close(latents[1], expected[1], rtol=0.02, atol=0.02)  # weights went through float16
    torch.testing.assert_close(latents[0], expected[0], rtol=0.05, atol=0.1)
    assert "overflowed in torch.float16 for 1 pictures" in caplog.text
    assert vae.dtype == torch.float16
    assert not any(parameter.is_inference() for parameter in vae.parameters())


@torch.inference_mode()
def test_a_row_that_overflows_is_decoded_in_float32(vae, small: Tensor):
    latents = sdxl.encode_image(vae, small)
    expected = sdxl.decode_latents(vae, latents)
    _overflow_in_half(vae.decoder.mid_block, row=0)
    decoded = sdxl.decode_latents(vae.to(torch.float16), latents)
    assert decoded.dtype == torch.float32 and vae.dtype == torch.float16
    torch.testing.assert_close(decoded, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_that_cannot_be_encoded_is_flagged_and_harms_no_other(vae, small: Tensor, dtype: torch.dtype):
    broken = small.clone()
    broken[1, 0, 5, 5] = float("nan")
    latents = sdxl.encode_image(vae.to(dtype), broken)
    assert sdxl.rows_not_finite(latents) == [1]
    torch.testing.assert_close(latents[:1].to(dtype), sdxl.encode_image(vae, small[:1]))


def test_slicing_runs_one_row_at_a_time_with_the_same_result(vae, pictures: Tensor, monkeypatch: pytest.MonkeyPatch):
    expected = sdxl.encode_image(vae, pictures)
    rows = []
    vae.encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    configure_vae(vae, slicing=True)
    _assert_near(sdxl.encode_image(vae, pictures), expected)
    assert rows == [1, 1]
    decoded = sdxl.decode_latents(vae, expected)
    configure_vae(vae)
    _assert_near(sdxl.decode_latents(vae, expected), decoded)


def test_tiles_are_bounded_and_blend_into_nearly_the_same(vae, pictures: Tensor):
    latents, sizes = sdxl.encode_image(vae, pictures), []
    decoded = sdxl.decode_latents(vae, latents)
    vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    configure_vae(vae, tiling=True, tile_size=96)
    tiled_latents, tiled = sdxl.encode_image(vae, pictures), sdxl.decode_latents(vae, latents)
    assert set(sizes) == {(96, 96), (12, 12)} and len(sizes) == 2 * 2 * 3
    assert (tiled_latents - latents).abs().mean() < 0.2 * latents.abs().mean()
    assert (tiled - decoded).abs().mean() < 0.08
    # No seam: along tile borders the picture changes no faster than it does without tiles.
    steps, plain = tiled.diff(dim=-1).abs().mean(dim=(0, 1, 2)), decoded.diff(dim=-1).abs().mean(dim=(0, 1, 2))
    assert steps.max() < 2 * plain.max()


def test_small_pictures_are_not_tiled(vae, pictures: Tensor):
    expected = sdxl.encode_image(vae, pictures[:, :, :64, :64])
    configure_vae(vae, tiling=True, tile_size=64)
    assert torch.equal(sdxl.encode_image(vae, pictures[:, :, :64, :64]), expected)


@pytest.mark.parametrize(("length", "tile"), [(12, 12), (13, 12), (20, 12), (24, 12), (100, 12), (128, 64), (129, 64)])
def test_tiles_cover_everything_with_overlap(length: int, tile: int):
    starts = _tile_starts(length, tile)
    assert starts[0] == 0 and starts[-1] + min(tile, length) == length
    assert all(0 < after - before <= tile - tile // 4 for before, after in pairwise(starts))
