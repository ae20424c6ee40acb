"""The pictures that others are drawn over, and their masks: which request takes which, and how they are read.

Source: gen_img.md section 9 (order and sizes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.data.folder_listing import list_folder
from library.data.pixels import to_mask, to_pixels
from library.data.transforms import resize
from library.errors import UserError
from library.inference.request import CELL, SMALLEST_SIDE, GenRequest
from library.io.images import read_image, read_size
from library.models.families import sdxl
from library.sizes import Size

if TYPE_CHECKING:
    from library.models.bundle import ModelBundle

_STEP = 32  # pixels: sd-scripts rounds the size of a picture that is drawn over down to whole blocks of the U-Net


def picture_files(names: Sequence[str], *, option: str) -> list[str]:
    """The files that an option names, a folder standing for its images by name.

    Raises UserError for an empty folder and for files that are no images.
    """
    paths: list[str] = []
    for name in names:
        found = [str(Path(name) / image) for image in list_folder(name).images] if Path(name).is_dir() else [name]
        if not found:
            raise UserError("the folder holds no image", f"{option} {name}", "name one that holds images")
        paths += found
    for path in paths:
        read_size(path)
    return paths


def with_sources(
    requests: Sequence[GenRequest], images: Sequence[str], masks: Sequence[str] = (), *, start: int = 0
) -> list[GenRequest]:
    """The pictures of a run, from number `start` on, with the images that they are drawn over and their masks: one
    after the other, then from the first again.

    A request whose sides are both open gets the size of its image, in whole steps of 32 pixels, as in sd-scripts; where
    one is open it follows from the shape of the image.
    """
    if not images:
        return list(requests)
    taken = []
    for number, request in enumerate(requests, start):
        image, mask = images[number % len(images)], masks[number % len(masks)] if masks else None
        taken.append(with_image_size(replace(request, image=image, mask=mask)))
    return taken


def with_image_size(request: GenRequest) -> GenRequest:
    """A request with the size or shape of its image on the sides that are open; without an image, as it is."""
    image = request.image
    if image is None or (request.size.w and request.size.h):
        return request
    return replace(
        request, size=_fitting(request.size, read_size(image) if isinstance(image, str) else Size(*image.size))
    )


def _fitting(size: Size, image: Size) -> Size:
    if size.w or size.h:
        scale = size.w / image.w if size.w else size.h / image.h
        return Size(size.w or _whole(image.w * scale, CELL), size.h or _whole(image.h * scale, CELL))
    return Size(_whole(image.w, _STEP), _whole(image.h, _STEP))


def _whole(side: float, step: int) -> int:
    return max(SMALLEST_SIDE, int(side) // step * step)


@torch.no_grad()
def init_latents(bundle: ModelBundle, batch: Sequence[GenRequest]) -> tuple[Tensor | None, Tensor | None]:
    """Scaled latents (B, 4, h, w) of the images of a batch whose requests are all of one size, and the mask
    (B, 1, h, w), 1 where it is white; None for each that the requests do not have.

    Images are resized with Lanczos' filter. The latents are the means of the VAE's posterior.
    """
    images = [request.image for request in batch if request.image is not None]
    masks = [request.mask for request in batch if request.mask is not None]
    assert len(images) in (0, len(batch)) and len(masks) in (0, len(images)), "they share no batch"
    if not images:
        return None, None
    size = batch[0].size
    pixels = torch.stack([picture_pixels(image, size) for image in images])
    latents = latents_of(bundle, pixels)
    return latents, torch.stack([_mask_cells(mask, size) for mask in masks]) if masks else None


def latents_of(bundle: ModelBundle, pixels_B3HW: Tensor) -> Tensor:
    """Scaled latents (B, 4, h, w), float32, of pictures in [-1, 1], encoded one by one."""
    rows = [sdxl.encode_image(bundle.vae, row).float() for row in pixels_B3HW.split(1)]
    return torch.cat(rows) * bundle.scaling_factor


def picture_pixels(picture: str | Image.Image, size: Size) -> Tensor:
    """A picture at a size, (3, H, W) float32 in [-1, 1]; UserError for a file that is no picture."""
    image = read_image(picture) if isinstance(picture, str) else np.array(picture.convert("RGB"))
    return to_pixels(resize(image, size, interpolation="lanczos"))


def _mask_cells(mask: str | Image.Image, size: Size) -> Tensor:
    """The share of white in every latent cell, (1, h, w) in [0, 1]."""
    grey = (Image.fromarray(read_image(mask)) if isinstance(mask, str) else mask).convert("L")
    return to_mask(np.array(grey.resize((size.w // CELL, size.h // CELL), Image.Resampling.BOX)))[None]
