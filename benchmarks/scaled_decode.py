"""JPEGs that are decoded smaller: how far the result is from that of the whole image, and what it saves.

    python benchmarks/scaled_decode.py [--repeats 3]

Four made-up photos of 6 megapixels (soft gradients; sensor noise; hard edges; fine texture with noise), once with even
and once with odd sides, are shrunk by the trainer's rule (library.data.transforms.decode_scale) and once more from the
whole image, with the same area filter. Differences are in levels of 255. For comparison: how far a Lanczos reduction of
the whole image is from its area reduction. Times are decode plus resize, scaled over whole, fastest of the repeats,
alternating; files are in the system's cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

KINDS = ("gradients", "noise", "edges", "texture")
SIZES = ((3024, 2016), (3025, 2015))
SHRINKS = (2.1, 2.5, 3, 3.9, 4, 6, 9)
NOISE = {"gradients": 1.0, "noise": 8.0, "edges": 3.0, "texture": 4.0}  # levels, one standard deviation


def write_photo(path: Path, kind: str, width: int, height: int) -> None:
    """A JPEG of quality 92, the same on every run."""
    rng = np.random.default_rng(width + height + KINDS.index(kind))
    image = np.full((height, width, 3), 128.0)
    for cells, strength in ((4, 60), (16, 30), (64, 15)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 127.5 - 1) * strength
    if kind in ("edges", "texture"):
        image = draw_shapes(image, rng)
    if kind == "texture":
        texture = cv2.GaussianBlur(rng.normal(0, 1, (height, width)), (0, 0), 1.0)
        image += (texture / texture.std() * 18)[:, :, None]
    image += rng.normal(0, NOISE[kind], image.shape)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=92)


def draw_shapes(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image with discs and lines, a little out of focus as a lens leaves them."""
    height, width = image.shape[:2]
    canvas = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(300):
        x, y, radius = int(rng.integers(width)), int(rng.integers(height)), int(rng.integers(4, 200))
        red, green, blue = rng.integers(0, 256, 3).tolist()
        if rng.random() < 0.5:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(red, green, blue))
        else:
            dx, dy, thick = rng.integers(-600, 600), rng.integers(-600, 600), int(rng.integers(1, 6))
            draw.line((x, y, x + int(dx), y + int(dy)), fill=(red, green, blue), width=thick)
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float64)


def fastest(work: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each piece of work, alternating."""
    best = [float("inf")] * len(work)
    for _ in range(repeats):
        for number, piece in enumerate(work):
            start = time.perf_counter()
            piece()
            best[number] = min(best[number], time.perf_counter() - start)
    return best


def row(path: Path, shrink: float, repeats: int) -> tuple[int, list[str]]:
    """The scale and the cells of a table for one picture and one shrink."""
    from library.config.dataset_spec import SubsetSpec
    from library.data.records import ImageRecord
    from library.data.transforms import decode_scale, read_record, resize
    from library.io.images import read_size
    from library.sizes import Size

    size = read_size(path)
    target = Size(int(size.w / shrink), int(size.h / shrink))
    record = ImageRecord("a", str(path), size, "", SubsetSpec(str(path.parent)))
    pixels = read_record(record)
    whole = resize(pixels, target).astype(float)
    off = np.abs(resize(read_record(record, target), target) - whole)
    lanczos = np.abs(resize(pixels, target, interpolation="lanczos") - whole)
    times = fastest(
        [lambda: resize(read_record(record, target), target), lambda: resize(read_record(record), target)], repeats
    )
    cells = [off.mean(), np.percentile(off, 99.9), off.max(), lanczos.mean(), times[0] / times[1]]
    return decode_scale(record, target), [f"{cells[0]:.2f}", *(f"{c:.0f}" for c in cells[1:3]),
                                          *(f"{c:.2f}" for c in cells[3:])]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print one row per picture and shrink."""
    from benchmarks._machine import machine_class

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args(argv).repeats
    cv2.setNumThreads(1)
    print(f"Scaled decoding on {machine_class(with_gpu=False)}\n")
    print("| sides | photo | shrink | decoded at | mean | 99.9% | max | Lanczos, mean | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for width, height in SIZES:
            for kind in KINDS:
                path = Path(folder) / f"{kind}_{width}.jpg"
                write_photo(path, kind, width, height)
                for shrink in SHRINKS:
                    scale, cells = row(path, shrink, repeats)
                    print(f"| {width}x{height} | {kind} | {shrink} | 1/{scale} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
