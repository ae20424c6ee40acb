"""Options of the files that picture generation writes, and of runs with very many of them."""

from __future__ import annotations

from typing import ClassVar

from library.config.fields import GENERATOR, Group, option

IMAGE_FORMATS = ("png", "webp", "jpeg")


class PictureOptions(Group):
    """Formats, contact sheets, and runs that stop, go on and are shared out."""

    title: ClassVar[str] = "picture files"
    acts: ClassVar[frozenset[str]] = GENERATOR

    image_format: str = option(
        "png", "format of the pictures; the ending of a name in a prompt (--f) comes first", choices=IMAGE_FORMATS
    )
    image_quality: int | None = option(
        None, "quality of WebP and JPEG files, 1 to 100 (unset: 100 for WebP, 95 for JPEG)", ge=1, le=100
    )
    parameters_file: bool = option(
        True, "write parameters.jsonl beside the pictures: a line for each with all that made it"
    )
    resume_bulk: bool = option(
        False,
        "go on with a run that stopped: pictures that parameters.jsonl names and that are there are not drawn again",
    )
    prompts_per_rank: bool = option(
        False, "share the pictures out among the processes of accelerate launch or torchrun, each on its own device"
    )
    grid: tuple[str, ...] = option(
        (),
        'contact sheets: rows and columns, such as `seeds`, `"steps=10,20,30"` or `prompts x "scale=3,5,7"`; axes are '
        "prompts, seeds, steps, scale, sampler, eta, negative_scale, guidance_rescale, strength, network_mul, size",
    )
