"""A picture read small is the picture read whole and made small."""

import io

import numpy as np
import pytest
from PIL import Image

from library.io.images import ImageError, read_image, read_reduced, read_size


def slope(width: int, height: int) -> Image.Image:
    """A smooth picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    return Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("size", [(640, 400), (300, 1000), (50, 40), (2000, 3)])
def test_it_is_the_whole_picture_made_small(tmp_path, kind, size):
    path = tmp_path / f"a.{kind}"
    slope(*size).save(path)
    found = read_reduced(path, edge=100)
    assert found.size == size and found.alpha is None
    assert max(found.rgb.shape) == min(100, max(size)) and min(found.rgb.shape[:2]) >= 1
    whole = Image.fromarray(read_image(path)).resize(found.rgb.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(found.rgb.astype(int) - np.asarray(whole).astype(int)).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_the_right_way_up(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    slope(320, 200).save(path, exif=exif)
    found = read_reduced(path, edge=64)
    assert found.size == read_size(path)
    whole = Image.fromarray(read_image(path)).resize(found.rgb.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(found.rgb.astype(int) - np.asarray(whole).astype(int)).mean() < 4


def test_transparency_comes_along(tmp_path):
    path = tmp_path / "a.png"
    picture = slope(200, 100)
    picture.putalpha(Image.fromarray(np.repeat([[0], [255]], 50, axis=0).astype(np.uint8).repeat(200, axis=1)))
    picture.save(path)
    found = read_reduced(path, edge=50)
    assert found.alpha.shape == (25, 50) and (found.alpha[0] == 0).all() and (found.alpha[-1] == 255).all()


def test_a_torn_picture_is_refused(tmp_path):
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        slope(600, 600).save(buffer, kind)
        path = tmp_path / f"a.{kind.lower()}"
        path.write_bytes(buffer.getvalue()[:-300])
        with pytest.raises(ImageError, match=r"a\."):
            read_reduced(path, edge=100)


def test_a_transparent_colour_of_a_palette_counts(tmp_path):
    path = tmp_path / "a.png"
    picture = Image.fromarray(np.repeat([[0], [1]], 50, axis=0).astype(np.uint8).repeat(200, axis=1), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.save(path, transparency=0)
    found = read_reduced(path, edge=50)
    assert (found.alpha[0] == 0).all() and (found.alpha[-1] == 255).all()
    slope(20, 20).save(path)
    assert read_reduced(path, edge=50).alpha is None
