"""Every kind of picture comes out as the same upright 8-bit RGB; every kind of damage is one sentence."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from library.errors import UserError
from library.io.images import (
    IMAGE_EXTENSIONS,
    ImageError,
    read_image,
    read_mask,
    read_picture,
    read_size,
)
from library.sizes import Size

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}}
LOSSY = {"JPEG": {"quality": 95}, "AVIF": {"quality": 95}, "WEBP": {"quality": 95}}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A smooth picture without symmetry, so that no rotation or mirror of it looks like another."""
    y, x = np.mgrid[0:24, 0:40]
    return Image.fromarray(np.stack([x * 6, y * 10, (x + y) * 3], axis=-1).astype(np.uint8))


def _pixels(path: Path) -> np.ndarray:
    """Read with warnings as errors, and check what must hold for every picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_image(path)
        size = read_size(path)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.flags.c_contiguous
    assert (size.h, size.w) == pixels.shape[:2] and isinstance(size, Size)
    return pixels


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_come_back_exactly(tmp_path: Path, picture: Image.Image, kind: str) -> None:
    picture.save(tmp_path / "a", kind, **LOSSLESS[kind])
    assert np.array_equal(_pixels(tmp_path / "a"), np.asarray(picture))


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_formats_come_back_nearly(tmp_path: Path, picture: Image.Image, kind: str) -> None:
    picture.save(tmp_path / "a", kind, **LOSSY[kind])
    assert np.abs(_pixels(tmp_path / "a").astype(int) - np.asarray(picture)).mean() < 4


def _pixels_and_alpha(path: Path, *, scale: int = 1) -> tuple[np.ndarray, np.ndarray]:
    pixels, _, alpha = read_picture(path, scale=scale, with_alpha=True)
    assert alpha is not None and read_picture(path).alpha is None
    return pixels, alpha


def _paletted(alpha: np.ndarray) -> tuple[Image.Image, bytes]:
    """A palette picture whose index is the alpha, and its transparent entries."""
    image = Image.fromarray(alpha, "L").convert("P")
    image.putpalette([channel for grey in range(256) for channel in (grey, 0, 0)])
    return image, bytes(range(256))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "WEBP"])
def test_alpha_of_every_kind_comes_back_exactly(tmp_path: Path, picture: Image.Image, kind: str) -> None:
    alpha = np.asarray(picture)[:, :, 1].copy()
    image = picture.copy()
    image.putalpha(Image.fromarray(alpha))
    options = {}
    if kind == "LA":
        image = image.convert("LA")
    elif kind == "P":
        image, transparency = _paletted(alpha)
        options = {"transparency": transparency}
    image.save(
        tmp_path / "a", "WEBP" if kind == "WEBP" else "PNG", **({"lossless": True} if kind == "WEBP" else options)
    )
    pixels, found = _pixels_and_alpha(tmp_path / "a")
    assert found.dtype == np.uint8 and np.array_equal(found, alpha)
    assert np.array_equal(pixels, _pixels(tmp_path / "a"))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16"])
def test_a_transparent_colour_is_alpha(tmp_path: Path, picture: Image.Image, mode: str) -> None:
    red = np.asarray(picture)[:, :, 0]
    image = Image.fromarray(red.astype(np.uint16) * 257) if mode == "I;16" else picture.convert(mode)
    where = np.asarray(image) == np.asarray(image)[0, 3]
    where = where.all(axis=-1) if mode == "RGB" else where
    colour = image.getpixel((3, 0))
    image.save(tmp_path / "a", "PNG", transparency=colour)
    _, alpha = _pixels_and_alpha(tmp_path / "a")
    assert 0 < where.mean() < 1 and np.array_equal(alpha, np.where(where, 0, 255))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_an_opaque_picture_has_an_alpha_of_255(tmp_path: Path, picture: Image.Image, kind: str) -> None:
    picture.save(tmp_path / "a", kind)
    _, alpha = _pixels_and_alpha(tmp_path / "a")
    assert alpha.shape == (24, 40) and (alpha == 255).all()


def test_alpha_is_scaled_with_a_jpeg_and_whole_with_what_is_only_named_so(tmp_path: Path, picture: Image.Image) -> None:
    picture.crop((0, 0, 39, 24)).save(tmp_path / "a.jpg", "JPEG")
    pixels, alpha = _pixels_and_alpha(tmp_path / "a.jpg", scale=2)
    assert alpha.shape == pixels.shape[:2] == (12, 19) and (alpha == 255).all()
    image = picture.copy()
    image.putalpha(picture.getchannel("R"))
    image.save(tmp_path / "b.jpg", "PNG")
    pixels, alpha = _pixels_and_alpha(tmp_path / "b.jpg", scale=2)
    assert pixels.shape == (24, 40, 3) and np.array_equal(alpha, pixels[:, :, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_alpha_and_masks_turn_with_the_picture(tmp_path: Path, picture: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture.copy()
    image.putalpha(picture.getchannel("R"))
    image.save(tmp_path / "a", "PNG", exif=exif)
    pixels, alpha = _pixels_and_alpha(tmp_path / "a")
    assert np.array_equal(alpha, pixels[:, :, 0])
    assert np.array_equal(read_mask(tmp_path / "a"), alpha)


def test_a_mask_is_the_red_channel_and_16_bits_become_8(tmp_path: Path, picture: Image.Image) -> None:
    red = np.asarray(picture)[:, :, 0]
    picture.save(tmp_path / "a", "PNG")
    Image.fromarray(red.astype(np.uint16) * 257).save(tmp_path / "deep", "PNG")
    assert np.array_equal(read_mask(tmp_path / "a"), red) and np.array_equal(read_mask(tmp_path / "deep"), red)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_exif_orientation_is_applied_to_pixels_and_size(
    tmp_path: Path, picture: Image.Image, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a", kind, exif=exif, **(LOSSY | LOSSLESS)[kind])
    with Image.open(tmp_path / "a") as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(_pixels(tmp_path / "a"), expected)
    assert read_size(tmp_path / "a") == (Size(24, 40) if orientation >= 5 else Size(40, 24))


def test_orientation_behind_the_pixels_of_a_png_counts(tmp_path: Path, picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    raw = buffer.getvalue()
    (tmp_path / "a.png").write_bytes(raw[:-12] + chunk + raw[-12:])
    assert np.array_equal(_pixels(tmp_path / "a.png"), np.asarray(picture.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"II*\0"])
def test_damaged_exif_counts_as_upright(tmp_path: Path, picture: Image.Image, exif: bytes) -> None:
    picture.save(tmp_path / "a", "JPEG", exif=exif)
    assert read_image(tmp_path / "a").shape == (24, 40, 3) and read_size(tmp_path / "a") == (40, 24)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in LOSSLESS for mode in ("1", "L", "LA", "P", "RGBA") if (kind, mode) != ("BMP", "LA")],
)
def test_every_mode_gives_its_rgb_and_drops_alpha(tmp_path: Path, picture: Image.Image, mode: str, kind: str) -> None:
    image = picture.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(picture.size))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image.save(tmp_path / "a", kind, **options)
    assert np.array_equal(_pixels(tmp_path / "a"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 2))])
def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path, picture: Image.Image, transparency) -> None:
    palette = picture.quantize(64)
    palette.save(tmp_path / "a.png", transparency=transparency)
    assert np.array_equal(_pixels(tmp_path / "a.png"), np.asarray(palette.convert("RGB")))


def test_cmyk_jpegs_are_converted(tmp_path: Path, picture: Image.Image) -> None:
    picture.convert("CMYK").save(tmp_path / "a.jpg", quality=95, subsampling=0)
    assert np.abs(_pixels(tmp_path / "a.jpg").astype(int) - np.asarray(picture)).mean() < 4


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_pictures_are_scaled_and_not_clipped(tmp_path: Path, channels: int) -> None:
    deep = np.linspace(0, 65535, 40 * 24 * channels).astype(np.uint16).reshape(24, 40, channels)
    cv2.imwrite(str(tmp_path / "a.png"), deep)
    rgb = np.broadcast_to(deep, (24, 40, 3)) if channels == 1 else deep[..., 2::-1]
    assert np.abs(_pixels(tmp_path / "a.png") - rgb / 257).max() <= 1


def test_eight_bits_stored_as_sixteen_come_back_exactly(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    cv2.imwrite(str(tmp_path / "a.png"), values * 257)
    assert np.array_equal(_pixels(tmp_path / "a.png")[..., 0], values)


@pytest.mark.parametrize("array", [np.full((4, 4), 70000, np.int32), np.full((4, 4), 0.5, np.float32)])
def test_deeper_pixels_are_refused_rather_than_clipped(tmp_path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="pixels"):
        read_image(tmp_path / "a.tif")


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "a.webp", lossless=True, save_all=True, append_images=[ImageOps.invert(picture)])
    assert np.array_equal(_pixels(tmp_path / "a.webp"), np.asarray(picture))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "AVIF"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_picture_is_an_error_and_never_half_a_picture(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "a"
    Image.fromarray(noise).save(path, kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert caught.value.problems[0].where == str(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "empty"),
        (b"<html>no</html>", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "picture"),
        (bytes(500), "not a picture"),
    ],
)
@pytest.mark.parametrize("read", [read_image, read_size])
def test_what_is_no_picture_is_named(tmp_path: Path, read, content: bytes, sentence: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=sentence) as caught:
        read(path)
    assert isinstance(caught.value, UserError) and caught.value.problems[0].where == str(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="cannot be"):
        read_size(tmp_path)


def _png_that_claims(width: int, height: int) -> bytes:
    raw = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for body in (b"IHDR" + header, b"IDAT" + zlib.compress(b"\0"), b"IEND"):
        raw += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return raw


def test_large_photographs_pass_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(_png_that_claims(12000, 10000))
    code = f"from library.io.images import read_size; print(read_size({str(path)!r}))"
    command = [sys.executable, "-W", "error::PIL.Image.DecompressionBombWarning", "-c", code]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "12000x10000" and "bomb" not in done.stderr


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(_png_that_claims(60000, 60000))
    with pytest.raises(ImageError, match="more than 178 megapixels"):
        read_size(path)


@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "AVIF"]),
    mode=st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "LA"]),
    size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    orientation=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_size_in_the_header_is_always_the_size_of_the_pixels(tmp_path: Path, kind, mode, size, orientation) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    try:
        Image.new("RGB", size).convert(mode).save(buffer, kind, **({} if kind == "BMP" else {"exif": exif}))
    except (OSError, ValueError):
        return  # the format has no such mode
    (tmp_path / "a").write_bytes(buffer.getvalue())
    width, height = size[::-1] if 5 <= orientation <= 8 and kind != "BMP" else size
    assert _pixels(tmp_path / "a").shape == (height, width, 3)


@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "AVIF"]),
    places=st.lists(st.integers(0, 400)),
    seed=st.integers(0, 255),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_an_image_error_or_harmless(tmp_path: Path, picture, kind, places: list[int], seed: int) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    raw = bytearray(buffer.getvalue())
    for place in places:
        raw[place % len(raw)] = (place * 31 + seed) % 256
    path = tmp_path / "a"
    path.write_bytes(raw)
    try:
        pixels = read_image(path)
    except ImageError as error:
        assert error.problems[0].where == str(path)
    else:
        assert read_size(path) == (pixels.shape[1], pixels.shape[0])


def test_endings_are_those_of_the_trainer() -> None:
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"} == IMAGE_EXTENSIONS
