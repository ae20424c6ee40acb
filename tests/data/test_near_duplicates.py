"""Pictures that look alike are found; pictures that only have something in common are not."""

import random

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from library.data.looking import identical_files
from library.data.near_duplicates import (
    MAX_COLOUR_DIFFERENCE,
    MAX_DISTANCE,
    colour_layout,
    groups_alike,
    perceptual_hash,
)


def scene(seed: int, width: int = 240, height: int = 180) -> np.ndarray:
    """Soft shapes on a slope of colour, uint8 (H, W, 3)."""
    rng = random.Random(seed)
    low, high = (np.array([rng.randrange(256) for _ in range(3)]) for _ in range(2))
    slope = np.linspace(0, 1, height)[:, None, None]
    image = Image.fromarray((low * (1 - slope) + high * slope).repeat(width, 1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(7):
        x, y, r = rng.randrange(width), rng.randrange(height), rng.randrange(15, 70)
        draw.ellipse([x - r, y - r, x + r, y + r], fill=tuple(rng.randrange(256) for _ in range(3)))
    return np.array(image.filter(ImageFilter.GaussianBlur(1)))


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


EDITS = {
    "smaller": lambda image: cv2.resize(image, (96, 72), interpolation=cv2.INTER_AREA),
    "larger": lambda image: cv2.resize(image, (400, 300), interpolation=cv2.INTER_CUBIC),
    "compressed": lambda image: compressed(image, 25),
    "a little brighter": lambda image: cv2.convertScaleAbs(image, alpha=1.0, beta=8),
    "a little text": lambda image: cv2.putText(image.copy(), "sample", (8, 172), 0, 0.4, (255, 255, 255), 1),
}


def grouped(pictures) -> list[list[int]]:
    layouts = np.array([colour_layout(picture) for picture in pictures])
    return groups_alike([perceptual_hash(picture) for picture in pictures], layouts)


@pytest.mark.parametrize("edit", EDITS)
def test_edited_copies_are_found(edit):
    originals = [scene(seed) for seed in range(12)]
    copies = [EDITS[edit](picture) for picture in originals]
    assert grouped(originals + copies) == [[number, number + 12] for number in range(12)]


def test_different_pictures_stay_apart():
    assert grouped([scene(seed) for seed in range(200)]) == []


def test_flat_pictures_are_alike_only_in_the_same_colour():
    flat = [np.full((64, 64, 3), colour, dtype=np.uint8) for colour in ((10, 20, 30), (200, 20, 30), (12, 20, 30))]
    assert grouped(flat) == [[0, 2]]


def test_the_same_shapes_in_other_colours_are_another_picture():
    picture = scene(3)
    assert grouped([picture, np.ascontiguousarray(picture[:, :, ::-1])]) == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2)), max_size=24))
def test_groups_are_those_of_comparing_every_pair(pictures):
    """A picture joins the earliest group whose first picture it looks like; checked with plain loops."""
    hashes = [[0, 0b111, 0b1111111, 2**64 - 1][code] ^ (1 << flip) for code, flip, _ in pictures]
    layouts = np.array([[colour * 12] * 192 for *_, colour in pictures], dtype=np.uint8).reshape(-1, 192)
    expected: list[list[int]] = []
    for i in range(len(pictures)):
        for group in expected:
            first = group[0]
            near = (hashes[first] ^ hashes[i]).bit_count() <= MAX_DISTANCE
            if near and abs(int(layouts[first][0]) - int(layouts[i][0])) <= MAX_COLOUR_DIFFERENCE:
                group.append(i)
                break
        else:
            expected.append([i])
    assert groups_alike(hashes, layouts) == [group for group in expected if len(group) > 1]


def test_identical_files_are_found_by_content(tmp_path):
    contents = [b"one", b"two", b"three", b"one", b"two", b"one", b"long er"]
    paths = []
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(content)
        paths.append(str(path))
    assert identical_files(paths) == [[0, 3, 5], [1, 4]]
    assert identical_files([paths[0], paths[0], str(tmp_path / "missing"), paths[2]]) == []
