"""Read pictures of every kind users have, always to 8-bit RGB, always the right way up; and masks.

Pixels are what Pillow's `convert("RGB")` gives, as in sd-scripts: alpha is not composited, so transparent areas show
the colour stored under them; colour profiles are not applied. Beyond that, 16-bit pictures are scaled to
8 bits (Pillow clips grey ones), and EXIF orientation is applied. Of an animation the first frame is read.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from library.errors import UserError
from library.sizes import Size

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"})
"""Lower-case endings that a folder scan takes for pictures."""

JPEG_SCALES = (1, 2, 4, 8)
"""By what libjpeg can divide the sides while it decodes."""

# Pillow warns from 89 and refuses from 179 megapixels. Photographs between the two are real; the refusal stays.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


class ImageError(UserError):
    """One picture cannot be read; it costs that picture, not the run."""


class Picture(NamedTuple):
    """A decoded picture: uint8 RGB pixels (H, W, 3), the size of the whole picture in the file, and, where it was asked
    for, the alpha uint8 (H, W)."""

    pixels: np.ndarray
    size: Size
    alpha: np.ndarray | None = None


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a picture as uint8 RGB (H, W, 3), rotated as its EXIF orientation says.

    Raises ImageError naming the file when it is missing, empty, cut short, too large, or no picture.
    """
    return read_picture(path).pixels


def read_picture(path: str | os.PathLike[str], *, scale: int = 1, with_alpha: bool = False) -> Picture:
    """Read a picture as `read_image` does; a JPEG with sides of `scaled_side`.

    The decoder leaves out the fine detail instead of computing and averaging it, in a half to a third of the time.
    Pictures of other kinds, whatever their names, come whole. The alpha of an opaque picture is 255 everywhere;
    transparency counts in every form: an alpha channel, a transparent colour, a palette with transparent entries.
    """
    assert scale in JPEG_SCALES, scale
    with _opened(path) as (image, file):
        orientation = _orientation(image, file)
        width, height = image.size
        scaled = Size(scaled_side(width, scale), scaled_side(height, scale))
        if is_scaled := image.format == "JPEG" and scale > 1 and min(width, height) >= scale:
            image.draft(None, (width // scale, height // scale))
        parts = ([_alpha(image)] if with_alpha else []) + [_to_rgb(image)]
        if is_scaled and image.size != scaled:
            parts = [part.crop((0, 0, *scaled)) for part in parts]  # the decoder rounds up
        if orientation in _TRANSPOSE:
            parts = [part.transpose(_TRANSPOSE[orientation]) for part in parts]
        pixels, *alpha = map(np.array, reversed(parts))
        return Picture(pixels, _shown(width, height, orientation), *alpha)


def scaled_side(side: int, scale: int) -> int:
    """The side of a JPEG that is scaled while decoding, in pixels: the nearest whole number."""
    return (side + scale // 2 - 1) // scale if scale > 1 else side


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a mask as uint8 (H, W): the red channel of a picture, grey pictures included. Raises ImageError."""
    return np.ascontiguousarray(read_image(path)[:, :, 0])


def read_size(path: str | os.PathLike[str]) -> Size:
    """Return the size `read_image` would give, from the header alone. Raises ImageError as it does."""
    with _opened(path) as (image, file):
        return _shown(*image.size, _orientation(image, file))


def _shown(width: int, height: int, orientation: int) -> Size:
    return Size(height, width) if orientation in _SIDEWAYS else Size(width, height)


class Reduced(NamedTuple):
    """A picture made small for looking at: `rgb` uint8 (h, w, 3), `size` of the whole picture, `alpha` uint8 (h, w).

    `alpha` is None when the picture has no transparency.
    """

    rgb: np.ndarray
    size: Size
    alpha: np.ndarray | None


def read_reduced(path: str | os.PathLike[str], *, edge: int) -> Reduced:
    """Read a picture as `read_image` does, its longer side scaled down to `edge` pixels; never enlarged.

    A JPEG is decoded at the smallest scale that is enough. Raises ImageError as `read_image` does.
    """
    with _opened(path) as (image, file):
        orientation = _orientation(image, file)
        whole = Size(*image.size)
        scale = min(1.0, edge / max(whole))
        small = (max(1, round(whole.w * scale)), max(1, round(whole.h * scale)))
        image.draft(None, small)
        alpha = _alpha(image) if image.has_transparency_data else None
        size = Size(whole.h, whole.w) if orientation in _SIDEWAYS else whole
        rgb = _scaled(_to_rgb(image), small, orientation)
        return Reduced(rgb, size, None if alpha is None else _scaled(alpha, small, orientation))


def _scaled(image: Image.Image, size: tuple[int, int], orientation: int) -> np.ndarray:
    image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.array(image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Image.Image, BinaryIO]]:
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ImageError("the picture file is empty", str(path), "replace or remove it")
            with Image.open(file) as image:
                yield image, file
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("the picture does not exist", str(path), "check the path") from error
    except UnidentifiedImageError as error:
        raise ImageError("the file is not a picture, or of a kind not known here", str(path), "remove it") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise ImageError(f"the picture has more than {limit} megapixels", str(path), "scale it down") from error
    except Exception as error:  # decoders answer damaged files with whatever their parsing runs into
        raise ImageError(f"the picture cannot be decoded ({error})", str(path), "replace or remove it") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 0xFFFF:
            raise ValueError("32-bit pixels")
        # The high byte, which is also what Pillow takes of 16-bit RGB; 8-bit v stored as v * 257 comes back exactly.
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; straight to RGB Pillow warns about the lost transparency
    return image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image:
    """The alpha of a picture of any mode, as an 8-bit grey picture."""
    if image.mode.startswith("I") and "transparency" in image.info:
        opaque = np.asarray(image) != image.info["transparency"]
        return Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA").getchannel("A")
    return Image.new("L", image.size, 255)


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """Return the EXIF orientation 1 to 8, read without decoding pixels; damaged EXIF counts as upright."""
    try:
        if image.format == "PNG" and "exif" not in image.info and "Raw profile type exif" not in image.info:
            # Image.getexif would decode the whole picture to look behind its pixels.
            exif = Image.Exif()
            exif.load(_late_png_exif(file))
        else:
            exif = image.getexif()
        return int(exif.get(_ORIENTATION_TAG, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1


def _late_png_exif(file: BinaryIO) -> bytes:
    """Return the eXIf chunk of a PNG wherever it stands, hopping from chunk to chunk; empty when there is none."""
    resume = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return file.read(length)
            file.seek(length + 4, os.SEEK_CUR)
        return b""
    finally:
        file.seek(resume)
