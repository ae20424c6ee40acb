"""Drawing in two sizes: a smaller picture first, enlarged, and the whole one over it (gen_img.md section 10)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from library.errors import UserError
from library.inference.decoding import decoded
from library.inference.request import CELL, SEED_END, SMALLEST_SIDE, GenRequest, HighresFix, Upscaler
from library.inference.source_pictures import latents_of, picture_pixels
from library.sizes import Size

if TYPE_CHECKING:
    from library.models.bundle import ModelBundle

_STEP = 32  # pixels, to which sd-scripts rounds the sides of the smaller picture down


def first_stage(request: GenRequest) -> GenRequest:
    """The request for the smaller picture: its size, the sizes and crops that the model is told, its steps.

    Sides are int(side * scale + 0.5), rounded down to 32 pixels, at least 64.
    """
    highres = request.highres
    assert highres is not None

    def scaled(side: int | None) -> int | None:
        return None if side is None else int(side * highres.scale + 0.5)

    def rounded(side: int) -> int:
        return max(SMALLEST_SIDE, (scaled(side) or 0) // _STEP * _STEP)

    return replace(
        request,
        size=Size(rounded(request.size.w), rounded(request.size.h)),
        steps=highres.steps,
        strength=request.strength if highres.strength is None else highres.strength,
        original_width=scaled(request.original_width),
        original_height=scaled(request.original_height),
        original_width_negative=scaled(request.original_width_negative),
        original_height_negative=scaled(request.original_height_negative),
        crop_top=scaled(request.crop_top),
        crop_left=scaled(request.crop_left),
        stage="0",
    )


def second_stage(request: GenRequest) -> GenRequest:
    """The request for the whole picture, whose noise is that of the next seed."""
    assert request.highres is not None and request.seed is not None
    control = () if request.highres.without_control else request.control
    return replace(request, seed=(request.seed + 1) % SEED_END, control=control, stage="1")


@torch.no_grad()
def enlarged(
    bundle: ModelBundle, latents_BChw: Tensor, size: Size, highres: HighresFix, *, vae_batch_size: int
) -> Tensor:
    """Scaled latents (B, 4, size.h / 8, size.w / 8), float32, of the smaller pictures' (B, 4, h, w).

    Latents are enlarged bilinearly, pictures with Lanczos' filter, or with the upscaler.
    """
    if highres.upscaler is not None:
        return _upscaled(bundle, latents_BChw, size, highres.upscaler, vae_batch_size=vae_batch_size)
    if highres.latents:
        cells = (size.h // CELL, size.w // CELL)
        return interpolate(latents_BChw.float(), cells, mode="bilinear", align_corners=False)
    return _encoded(bundle, list(decoded(bundle, latents_BChw, vae_batch_size)), size)


def _upscaled(
    bundle: ModelBundle, latents_BChw: Tensor, size: Size, upscaler: Upscaler, *, vae_batch_size: int
) -> Tensor:
    """What a module makes of the smaller pictures; UserError for what is neither pictures nor latents of the size."""
    takes_latents = upscaler.support_latents()
    pictures = None if takes_latents else list(decoded(bundle, latents_BChw, vae_batch_size))
    made = upscaler.upscale(
        bundle.vae,
        pictures,
        latents_BChw.clone() if takes_latents else None,  # to change in place, while the smaller picture stays
        bundle.vae.dtype,
        size.w,
        size.h,
        batch_size=len(latents_BChw),
        vae_batch_size=vae_batch_size,
    )
    if isinstance(made, Tensor):
        wanted = (len(latents_BChw), latents_BChw.shape[1], size.h // CELL, size.w // CELL)
        if made.shape != wanted:
            what = f"the upscaler gave latents of shape {tuple(made.shape)} where {wanted} are needed"
            raise UserError(what, "highres_fix_upscaler", "see docs/img2img.md")
        return made.float()
    if not all(isinstance(picture, Image.Image) for picture in made) or len(made) != len(latents_BChw):
        what = "the upscaler gave neither latents nor one picture for each that it was given"
        raise UserError(what, "highres_fix_upscaler", "see docs/img2img.md")
    return _encoded(bundle, made, size)


def _encoded(bundle: ModelBundle, pictures: Sequence[Image.Image], size: Size) -> Tensor:
    pixels = torch.stack([picture_pixels(picture, size) for picture in pictures])
    return latents_of(bundle, pixels)


def load_upscaler(module: str, arguments: Mapping[str, str]) -> Upscaler:
    """The upscaler of a Python module; UserError when there is none."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            fix = "check the spelling, and run in the folder that holds it"
            raise UserError(f"the module {module} cannot be imported: {error}", "highres_fix_upscaler", fix) from None
        raise
    if not hasattr(found, "create_upscaler"):
        fix = "see docs/img2img.md for what it needs"
        raise UserError(f"the module {module} has no function create_upscaler", "highres_fix_upscaler", fix)
    return found.create_upscaler(**arguments)
