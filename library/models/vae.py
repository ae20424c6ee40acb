"""Pictures to latents and back: safe against half-precision overflow, row by row or tile by tile when asked.

Shape letters: B batch, H W pixels, h w latent cells (H/8, W/8). Latents are unscaled, as the VAE gives them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from library.diffusion.posterior import sample_posterior
from library.log import get_logger
from library.models.arch import LATENT_FACTOR

log = get_logger(__name__)

OVERLAP = 4  # neighbouring tiles share a quarter of their side


def encode_image(vae: Any, pixels_B3HW: Tensor, posterior_noise_B4hw: Tensor | None = None) -> Tensor:
    """Latents (B, 4, h, w), unscaled, of pictures in [-1, 1]; H and W divisible by 8.

    mean + standard deviation * noise when noise is given, else the mean. A row that is not finite (SDXL's VAE
    overflows in float16) is encoded again in float32; a row that still is not finite stays so: see
    `rows_not_finite`. Result in the VAE's dtype, float32 when a row had to be encoded in it.
    """
    return sample_posterior(encode_moments(vae, pixels_B3HW), posterior_noise_B4hw)


def encode_moments(vae: Any, pixels_B3HW: Tensor) -> Tensor:
    """Mean and log-variance of the posterior, (B, 8, h, w); a row that is not finite is encoded again in float32."""
    moments = _moments(vae, pixels_B3HW)
    broken = rows_not_finite(moments)
    if broken and vae.dtype != torch.float32:
        log.warning(f"the VAE overflowed in {vae.dtype} for {len(broken)} pictures; encoding them in float32")
        moments = moments.float()
        with _in_float32(vae):
            moments[broken] = _moments(vae, pixels_B3HW[broken])
    return moments


def decode_latents(vae: Any, latents_B4hw: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] (not clamped) of unscaled latents; rows that overflow are decoded in float32."""
    pixels = _pixels(vae, latents_B4hw)
    broken = rows_not_finite(pixels)
    if broken and vae.dtype != torch.float32:
        log.warning(f"the VAE overflowed in {vae.dtype} for {len(broken)} pictures; decoding them in float32")
        pixels = pixels.float()
        with _in_float32(vae):
            pixels[broken] = _pixels(vae, latents_B4hw[broken])
    return pixels


def rows_not_finite(batch: Tensor) -> list[int]:
    """Rows of a batch that hold NaN or infinity."""
    return torch.nonzero(~torch.isfinite(batch).flatten(1).all(dim=1)).flatten().tolist()


def configure_vae(vae: Any, *, slicing: bool = False, tiling: bool = False, tile_size: int | None = None) -> None:
    """Switch one-picture-at-a-time and tile-by-tile work on or off; both save memory, the second changes results a bit.

    `tile_size` in pixels, a multiple of 32; half the model's usual picture size when not given.
    """
    vae.use_slicing, vae.use_tiling = slicing, tiling
    vae.tile_sample_min_size = tile_size or max(vae.config.sample_size // 2, 4 * LATENT_FACTOR)
    assert vae.tile_sample_min_size % (OVERLAP * LATENT_FACTOR) == 0, tile_size
    vae.tile_latent_min_size = vae.tile_sample_min_size // LATENT_FACTOR


def _moments(vae: Any, pixels_B3HW: Tensor) -> Tensor:
    """Mean and log variance of the posterior, (B, 8, h, w)."""

    def encode(pixels: Tensor) -> Tensor:
        return vae.quant_conv(vae.encoder(pixels))

    pixels_B3HW = pixels_B3HW.to(vae.device, vae.dtype)
    return torch.cat([_by_tiles(vae, encode, rows, unit=LATENT_FACTOR) for rows in _slices(vae, pixels_B3HW)])


def _pixels(vae: Any, latents_B4hw: Tensor) -> Tensor:
    def decode(latents: Tensor) -> Tensor:
        return vae.decoder(vae.post_quant_conv(latents))

    latents_B4hw = latents_B4hw.to(vae.device, vae.dtype)
    return torch.cat([_by_tiles(vae, decode, rows, unit=1) for rows in _slices(vae, latents_B4hw)])


@contextmanager
def _in_float32(vae: Any) -> Iterator[None]:
    """Widen the VAE for a while; going back to its dtype is exact.

    Leaves inference mode for the casts: parameters made inside it could never be used for training again. The plain
    `to` of torch, since that of diffusers warns about modules to be kept in float32, of which there are none.
    """
    dtype = vae.dtype
    with torch.inference_mode(False):
        nn.Module.to(vae, torch.float32)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            nn.Module.to(vae, dtype)


def _slices(vae: Any, batch: Tensor) -> Iterator[Tensor]:
    yield from batch.split(1 if vae.use_slicing else max(1, len(batch)))


def _by_tiles(vae: Any, run: Callable[[Tensor], Tensor], batch: Tensor, *, unit: int) -> Tensor:
    """run(batch), or overlapping tiles of it blended into each other; `unit` is input cells per latent cell.

    Tiles have equal size and are spread evenly, so that none is a sliver (each tile is normalised on its own). Where
    tiles overlap they are averaged with weights that rise linearly from each tile's edge.
    """
    height, width = batch.shape[-2] // unit, batch.shape[-1] // unit  # in latent cells
    tile = vae.tile_latent_min_size
    if not vae.use_tiling or max(height, width) <= tile:
        return run(batch)
    total: Tensor | None = None
    weight_sum: Tensor | None = None
    for top in _tile_starts(height, tile):
        for left in _tile_starts(width, tile):
            rows = slice(top * unit, min(top + tile, height) * unit)
            columns = slice(left * unit, min(left + tile, width) * unit)
            part = run(batch[..., rows, columns])
            out = LATENT_FACTOR // unit if unit == 1 else 1  # output cells per latent cell
            if total is None or weight_sum is None:
                total = part.new_zeros(*part.shape[:2], height * out, width * out, dtype=torch.float32)
                weight_sum = torch.zeros_like(total[:1, :1])
            weight = _ramp(part.shape[-2], tile * out)[:, None] * _ramp(part.shape[-1], tile * out)[None]
            weight = weight.to(part.device)
            window = (..., slice(top * out, top * out + part.shape[-2]), slice(left * out, left * out + part.shape[-1]))
            total[window] += part.float() * weight
            weight_sum[window] += weight
    assert total is not None and weight_sum is not None
    return (total / weight_sum).to(batch.dtype)


def _tile_starts(length: int, tile: int) -> list[int]:
    """Evenly spread starts of the fewest tiles that cover `length` with the least overlap kept."""
    if length <= tile:
        return [0]
    step = tile - tile // OVERLAP
    count = -(-(length - tile) // step) + 1
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def _ramp(length: int, tile: int) -> Tensor:
    """Blending weights along one side of a tile: up over the overlap, flat, down; never 0."""
    rise = max(1, tile // OVERLAP)
    place = torch.arange(length, dtype=torch.float32)
    return torch.minimum(place + 1, length - place).clamp(max=rise) / rise
