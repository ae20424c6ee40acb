"""Pictures on disk: PNG with what made them as text chunks, and sd-scripts' file names (gen_img.md §14)."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.inference.request import GenRequest
from library.io.atomic import atomic_path


def png_text(request: GenRequest) -> dict[str, str]:
    """The text chunks of a picture, under sd-scripts' keys; size ids that were not given are "None".

    eta and guidance-rescale, which sd-scripts does not have, negative-scale and clip-prompt are there when they were
    given.
    """
    given = {"eta": request.eta, "negative-scale": request.negative_scale}
    given |= {"guidance-rescale": request.guidance_rescale or None, "clip-prompt": request.clip_prompt or None}
    return {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "sampler": request.sampler,
        "steps": str(request.steps),
        "scale": str(request.scale),
        "negative-prompt": request.negative,
        "raw-prompt": request.raw,
        "original-height": str(request.original_height),
        "original-width": str(request.original_width),
        "original-height-negative": str(request.original_height_negative),
        "original-width-negative": str(request.original_width_negative),
        "crop-top": str(request.crop_top),
        "crop-left": str(request.crop_left),
        **{key: str(value) for key, value in given.items() if value is not None},
    }


def save_png(picture: Image.Image, path: Path, text: dict[str, str]) -> None:
    """Write a PNG with text chunks, atomically; UserError when there is no space left."""
    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value) if not value.isascii() else chunks.add_text(key, value)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)


@dataclass
class PictureWriter:
    """Writes a run's pictures into one folder and remembers where they are.

    Names: `im_000001.png` and so on when sequential, else `im_<time>_<number>_<seed>.png`. The number counts the
    pictures of the run (in sd-scripts: of the batch, so that two pictures of one second and seed would collide). A
    name that a prompt gives (`--f`) is taken as it is by the first of the run's pictures that has it, and with _001
    and so on by the next.
    """

    folder: Path
    sequential: bool = False
    paths: list[Path] = field(default_factory=list)

    def write(self, request: GenRequest, picture: Image.Image) -> Path:
        """Save one picture and return its path."""
        number = len(self.paths)
        if request.name:
            name = self._free(request.name)
        elif self.sequential:
            name = f"im_{number + 1:06d}.png"
        else:
            name = f"im_{time.strftime('%Y%m%d%H%M%S')}_{number:03d}_{request.seed}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        save_png(picture, path, png_text(request))
        self.paths.append(path)
        return path

    def _free(self, name: str) -> str:
        taken, stem = {path.name.lower() for path in self.paths}, name[: -len(".png")]
        return next(
            free
            for free in (name, *(f"{stem}_{number:03d}.png" for number in range(1, len(taken) + 2)))
            if free.lower() not in taken
        )
