"""The noise a sample is diffused with, and what may be added to it.

Every sample has its own random numbers, so all of them are drawn before the latents are known; what depends on the
latents (the adaptive offset) is put together afterwards, in `training_noise`.

Shape letters: B batch, C latent channels, h w latent cells. Source of all forms: spec conditioning.md section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


def sample_noise(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Draw standard normal float32 noise of `shape` on the generator's device.

    Training passes a CPU generator of its own for every sample, so the noise is the same on every device and in
    every batch.
    """
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)


@dataclass(frozen=True)
class NoiseSettings:
    """What is added to the noise; 0 switches a part off.

    offset: strength of noise that is constant over a channel; `offset_is_random`: each sample's strength is drawn from
    [0, offset). pyramid_iterations, pyramid_discount: levels of ever coarser noise, each weaker by the discount.
    perturbation: strength of the noise that only the model's input gets, with `perturbation_is_random` likewise.
    """

    offset: float = 0.0
    offset_is_random: bool = False
    pyramid_iterations: int = 0
    pyramid_discount: float = 0.3
    perturbation: float = 0.0
    perturbation_is_random: bool = False


@dataclass(frozen=True)
class NoiseExtras:
    """The random numbers of these parts, float32; None where a part is off.

    offset_BC: standard normal, one number per channel; offset_strength_B: what it is multiplied with, >= 0.
    pyramid_BChw: the sum of all levels. perturbation_BChw: already multiplied by its strength.
    """

    offset_BC: Tensor | None = None
    offset_strength_B: Tensor | None = None
    pyramid_BChw: Tensor | None = None
    perturbation_BChw: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[NoiseExtras]) -> NoiseExtras:
        """Join along the batch; all parts come from the same settings."""
        columns = {slot.name: [getattr(part, slot.name) for part in parts] for slot in fields(cls)}
        return cls(**{name: None if rows[0] is None else torch.cat(rows) for name, rows in columns.items()})

    def to(self, device: torch.device | str) -> NoiseExtras:
        """The same numbers on `device`."""
        moved = {slot.name: getattr(self, slot.name) for slot in fields(self)}
        return NoiseExtras(**{k: None if v is None else v.to(device, non_blocking=True) for k, v in moved.items()})


def draw_extras(
    settings: NoiseSettings, generator: Callable[[str], torch.Generator], shape: tuple[int, int, int]
) -> NoiseExtras:
    """The extras of one sample (B = 1) of latents (C, h, w); `generator(purpose)` gives a generator per purpose."""
    offset = strength = pyramid = perturbation = None
    if settings.offset:
        source = generator("noise offset")
        offset = sample_noise(source, (1, shape[0]))
        strength = _strength(settings.offset, source, is_random=settings.offset_is_random)
    if settings.pyramid_iterations:
        pyramid = _pyramid(generator("multires noise"), shape, settings)[None]
    if settings.perturbation:
        source = generator("noise perturbation")
        normal = sample_noise(source, (1, *shape))
        scale = _strength(settings.perturbation, source, is_random=settings.perturbation_is_random)
        perturbation = normal * scale
    return NoiseExtras(offset, strength, pyramid, perturbation)


def _strength(value: float, generator: torch.Generator, *, is_random: bool) -> Tensor:
    """`value`, or a number drawn from [0, value), (1,)."""
    if not is_random:
        return torch.full((1,), value, dtype=torch.float32)
    return torch.rand(1, generator=generator, dtype=torch.float32) * value


def _pyramid(generator: torch.Generator, shape: tuple[int, int, int], settings: NoiseSettings) -> Tensor:
    """Sum over levels i of discount^i * noise of size (h, w) / r^i, enlarged bilinearly; r from [2, 4) for each level.

    The first level has full size; a level one of whose sides is a single cell is the last. (C, h, w)
    """
    channels, height, width = shape
    total_Chw = torch.zeros(shape, dtype=torch.float32)
    for level in range(settings.pyramid_iterations):
        ratio = 2 + 2 * float(torch.rand((), generator=generator, dtype=torch.float64))
        h, w = max(1, int(height / ratio**level)), max(1, int(width / ratio**level))
        coarse = sample_noise(generator, (1, channels, h, w))
        enlarged = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
        total_Chw = total_Chw + enlarged * settings.pyramid_discount**level
        if min(h, w) == 1:
            break
    return total_Chw


def training_noise(
    noise_BChw: Tensor, extras: NoiseExtras, latents_BChw: Tensor, *, adaptive_scale: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The noise that is the target, and the noise that the latents are mixed with; they differ by the perturbation.

    Offset, with the strength max(0, strength + adaptive_scale * |mean of the channel of the scaled latents|); then the
    pyramid, after which each sample is divided by its own standard deviation (that of a sample, n - 1).
    """
    if extras.offset_BC is not None:
        assert extras.offset_strength_B is not None
        strength_BC = extras.offset_strength_B[:, None].expand_as(extras.offset_BC)
        if adaptive_scale:
            strength_BC = (strength_BC + adaptive_scale * latents_BChw.mean(dim=(2, 3)).abs()).clamp(min=0)
        noise_BChw = noise_BChw + (strength_BC * extras.offset_BC)[:, :, None, None]
    if extras.pyramid_BChw is not None:
        noise_BChw = noise_BChw + extras.pyramid_BChw
        noise_BChw = noise_BChw / noise_BChw.std(dim=(1, 2, 3), keepdim=True)
    if extras.perturbation_BChw is None:
        return noise_BChw, noise_BChw
    return noise_BChw, noise_BChw + extras.perturbation_BChw
