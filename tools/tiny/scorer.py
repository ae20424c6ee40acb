"""Tell what a picture shows, without any model: colour, shape and background, and the concept's share.

`classify` is meant for plain scenes (no texture), uint8 HxWx3, any size from about 64 pixels.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

from tools.tiny import world

TEMPLATE_SIDE = 48


class Answer(NamedTuple):
    """What a picture shows, or should show."""

    colour: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        return world.plain_caption(*self)


def nearest_colour(rgb: np.ndarray) -> str:
    """Name of the palette colour nearest to an RGB triple."""
    table = np.array(list(world.PALETTE.values()), np.float64)
    return world.COLOURS[int(((table - rgb) ** 2).sum(axis=1).argmin())]


def _normalised(mask: np.ndarray) -> np.ndarray:
    """Move and scale a boolean mask so that its box is centred and its longer side fills the template."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    factor = TEMPLATE_SIDE / max(box.shape)
    height, width = (max(1, round(side * factor)) for side in box.shape)
    small = cv2.resize(box, (width, height), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    out = np.zeros((TEMPLATE_SIDE, TEMPLATE_SIDE), np.float32)
    top, left = (TEMPLATE_SIDE - height) // 2, (TEMPLATE_SIDE - width) // 2
    out[top : top + height, left : left + width] = small
    return out > 0.5


@cache
def _templates() -> dict[str, np.ndarray]:
    scenes = {shape: world.Scene("red", shape, "blue") for shape in world.SHAPES}
    return {shape: _normalised(world.figure_mask(scene) > 0.5) for shape, scene in scenes.items()}


def _figure(rgb: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Boolean HxW mask of the largest piece that differs from the background, its small gaps kept."""
    distance = np.abs(rgb.astype(np.float32) - background).max(axis=2)
    # Half of the figure's own distance puts the outline in the middle of a soft edge.
    threshold = max(30.0, 0.5 * float(np.percentile(distance, 97)))
    mask = (distance > threshold).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count < 2:
        return np.zeros(mask.shape, bool)
    return labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())


def classify(rgb: np.ndarray) -> Answer:
    """Colour, shape and background of a picture; shape and colour are "" where nothing stands out."""
    sides = (rgb[:4], rgb[-4:], rgb[:, :4], rgb[:, -4:])
    frame = np.concatenate([side.reshape(-1, 3) for side in sides])
    background = np.median(frame, axis=0)
    mask = _figure(rgb, background)
    if mask.sum() < 0.005 * mask.size:
        return Answer("", "", nearest_colour(background))
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    colour = np.median(rgb[inner if inner.sum() > 20 else mask], axis=0)
    found = _normalised(mask)
    overlap = {s: (found & t).sum() / (found | t).sum() for s, t in _templates().items()}
    return Answer(nearest_colour(colour), max(overlap, key=overlap.__getitem__), nearest_colour(background))


def prompts(seed: int, count: int, *, held_out: bool = False) -> list[Answer]:
    """What to ask for: plain scenes, either of the drawn pairs or only of the never drawn ones."""
    rng = np.random.default_rng([seed, 77])
    if not held_out:
        scenes = [world.sample_scene(rng, plain=True) for _ in range(count)]
        return [Answer(s.colour, s.shape, s.background) for s in scenes]
    pairs = sorted(world.HELD_OUT_PAIRS)
    answers = []
    for index in range(count):
        colour, shape = pairs[index % len(pairs)]
        answers.append(Answer(colour, shape, str(rng.choice([c for c in world.COLOURS if c != colour]))))
    return answers


def score(pictures: Sequence[np.ndarray], expected: Sequence[Answer]) -> dict[str, float]:
    """Shares of right colours, shapes, backgrounds and wholly right pictures, each 0..1."""
    found = [classify(picture) for picture in pictures]
    right = np.array([[a == b for a, b in zip(f, e, strict=True)] for f, e in zip(found, expected, strict=True)])
    names = ("colour", "shape", "background")
    return {name: float(right[:, i].mean()) for i, name in enumerate(names)} | {"all": float(right.all(axis=1).mean())}


def concept_share(rgb: np.ndarray) -> tuple[float, float]:
    """Shares of a picture's pixels that are the concept's magenta and lime, each 0..1.

    By construction nothing of the ordinary world counts. Green's distance below red and blue, not green
    itself, tells magenta: so the pale magenta of a half-learnt concept counts, while purple is too dark in
    red, pink too grey, red too poor in blue, and so is every mix of two palette colours on an edge (a test
    tries all of them).
    """
    r, g, b = (rgb[..., i].astype(np.int16) for i in range(3))
    magenta = (r > 165) & (np.minimum(r, b) - g > 90)
    lime = (g > 200) & (b < 85) & (g - r > 45) & (r > 90)
    return float(magenta.mean()), float(lime.mean())
