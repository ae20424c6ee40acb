"""A picture on disk: PNG, WebP or JPEG with what made it, and its file name (gen_img.md §14)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.inference.request import GenRequest
from library.io.atomic import atomic_path
from library.sizes import Size

ENDINGS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
"""The ending of a file of each image_format."""
PARAMETERS = "parameters"
"""The key of the PNG text chunk that other programs read."""
_FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
_LONGEST_SIDE = {"WEBP": 16383, "JPEG": 65500}  # of the file formats; libjpeg stays a little below its own 65535
_QUALITY = {"WEBP": 100, "JPEG": 95}  # sd-scripts' quality of WebP
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_LONG, _UNDEFINED = 4, 7  # types of TIFF entries
_LONGEST_EXIF = 65533  # bytes of a JPEG segment after its length


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


def save_png(picture: Image.Image, path: Path, text: Mapping[str, str]) -> None:
    """Write a PNG with text chunks, atomically; UserError when there is no space left."""
    save_picture(picture, path, text)


def save_picture(picture: Image.Image, path: Path, text: Mapping[str, str], *, quality: int | None = None) -> None:
    """Write a picture in the format of the path's ending, atomically.

    text: the chunks of a PNG; in WebP and JPEG `parameters` alone is kept, as EXIF UserComment, the way A1111 does.
    quality: 1 to 100 for WebP and JPEG (None: 100 and 95). What misfit() names must have been checked. UserError when
    there is no space left.
    """
    kind = _FORMATS[path.suffix.lower()]
    settings: dict[str, object] = {}
    if kind == "PNG":
        chunks = PngInfo()
        for key, value in text.items():
            chunks.add_itxt(key, value) if not value.isascii() else chunks.add_text(key, value)
        settings["pnginfo"] = chunks
    else:
        settings["quality"] = _QUALITY[kind] if quality is None else quality
        if PARAMETERS in text:
            settings["exif"] = exif_of(text[PARAMETERS])
    with atomic_path(path) as temporary:
        picture.save(temporary, format=kind, **settings)


def misfit(name: str, size: Size, parameters: str) -> str:
    """Why a picture cannot be written into a file of this name; "" when it can."""
    kind = _FORMATS[Path(name).suffix.lower()]
    longest = _LONGEST_SIDE.get(kind, max(size))
    if max(size) > longest:
        return f"{kind} files have at most {longest} pixels a side, and the picture has {size.w} x {size.h}"
    if kind == "JPEG" and len(exif_of(parameters)) > _LONGEST_EXIF:
        return f"JPEG files hold about {_LONGEST_EXIF // 2} letters of parameters, and there are {len(parameters)}"
    return ""


def longest_side(ending: str) -> int | None:
    """The most pixels that a side of a picture can have in a file with this ending; None: any number."""
    return _LONGEST_SIDE.get(_FORMATS[ending])


def exif_of(parameters: str) -> bytes:
    """EXIF data whose UserComment is the text in big-endian UTF-16, as A1111 writes and reads it.

    One directory that leads to another with one entry. Pillow would write the entry as numbers (BYTE), and what A1111
    reads with takes only UNDEFINED, as the standard says.
    """
    comment = b"UNICODE\0" + parameters.encode("utf-16-be", errors="replace")
    header = b"Exif\0\0" + struct.pack(">2sHL", b"MM", 42, 8)
    first = struct.pack(">HHHLLL", 1, _EXIF_IFD, _LONG, 1, 26, 0)
    return header + first + struct.pack(">HHHLLL", 1, _USER_COMMENT, _UNDEFINED, len(comment), 44, 0) + comment


@dataclass
class Names:
    """The file names of a run's pictures.

    `im_000001.png` and so on when sequential, else `im_<stamp>_<number>_<seed>.png`, the stamp being the time when the
    run began to draw. The number counts the pictures of the run (in sd-scripts: of the batch, so that two pictures of
    one second and seed would collide). Of a picture in two sizes it follows a 0 (the smaller one) or a 1. A name that a
    prompt gives (`--f`), or that of the picture that is drawn over (originals), is taken as it is by the first of the
    run's pictures that has it, and with _001 and so on by the next; the ending of a given one decides the format. The
    smaller picture of such a name has _0 after it.
    """

    ending: str
    sequential: bool
    stamp: str
    originals: bool = False
    _taken: set[str] = field(default_factory=set)
    _repeats: dict[str, int] = field(default_factory=dict)

    def next(self, request: GenRequest, number: int) -> str:
        """The name of picture `number` (from 0), which is then taken."""
        if given := self._given(request):
            stem, ending = given
            name = f"{stem}_0{ending}" if request.stage == "0" else f"{stem}{ending}"
        elif self.sequential:
            name = f"im_{request.stage}{number + 1:06d}{self.ending}"
        else:
            name = f"im_{self.stamp}_{request.stage}{number:03d}_{request.seed}{self.ending}"
        return self._free(name)

    def is_time(self, request: GenRequest) -> bool:
        """Whether a picture's name tells the time, and so differs from run to run."""
        return not self.sequential and self._given(request) is None

    def _given(self, request: GenRequest) -> tuple[str, str] | None:
        """What a prompt or the picture that is drawn over says: the name and its ending."""
        if request.name:
            path = Path(request.name)
            known = path.suffix.lower() in _FORMATS
            return (path.stem, path.suffix) if known else (request.name, self.ending)
        if self.originals and isinstance(request.image, str):
            return Path(request.image).stem, self.ending
        return None

    def _free(self, name: str) -> str:
        stem, ending, free = Path(name).stem, Path(name).suffix, name
        while free.lower() in self._taken:
            repeat = self._repeats[name.lower()] = self._repeats.get(name.lower(), 0) + 1
            free = f"{stem}_{repeat:03d}{ending}"
        self._taken.add(free.lower())
        return free
