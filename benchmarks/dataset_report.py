"""Time, CPU and memory of a dataset report over many pictures, with its JSON and HTML files.

python benchmarks/dataset_report.py [--images 10000] [--folder FOLDER]

Writes synthetic JPEG files of 512 to 1024 pixels with captions into FOLDER (a temporary one when none is given; what
is there already is used again), then starts the tool as users do.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 60
SIDES = (512, 640, 768, 896, 1024)
WORDS = [f"{first} {second}" for first in ("red", "old", "small", "bright") for second in ("hat", "tree", "sky", "cat")]


def write_image(folder: Path, number: int) -> int:
    """A JPEG file with soft shapes and grain, and its caption; returns the bytes of the picture."""
    path = folder / f"{number:06d}.jpg"
    if path.is_file():
        return path.stat().st_size
    rng = np.random.default_rng(number)
    width, height = rng.choice(SIDES, 2).tolist()
    coarse = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = cv2.resize(rng.integers(0, 48, (256, 256, 3), dtype=np.uint8), (width, height))
    words = random.Random(number).sample(WORDS, 8)
    path.with_suffix(".txt").write_text(", ".join([f"picture {number}", *words]), encoding="utf-8")
    cv2.imwrite(str(path), cv2.add(image, grain), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return path.stat().st_size


def measure(folder: Path, output: Path) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak MB) of one report over the pictures in `folder`."""
    command = [sys.executable, str(ROOT / "tools" / "dataset_report.py"), "--resolution", "1024", "--enable_bucket"]
    command += ["--train_data_dir", str(folder.parent), "--caption_extension", ".txt", "--flip_aug", "--seed", "1"]
    command += ["--json", str(output / "report.json"), "--html", str(output / "report.html")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, after.ru_maxrss / 1024


def main(argv: list[str] | None = None) -> int:
    """Write the pictures, make the report, print the figures."""
    from benchmarks._machine import machine_class

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / "train" / "1_thing"
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            total = sum(pool.map(lambda number: write_image(folder, number), range(arguments.images)))
        print(f"{arguments.images} JPEG files, {total / arguments.images / 1000:.0f} kB on average", flush=True)
        output = Path(temporary)
        wall, cpu, peak = measure(folder, output)
        sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in sorted(output.glob("report.*")))
        print(f"dataset report on {machine_class(with_gpu=False)}: {wall:.1f} s wall, {cpu:.1f} s CPU, {peak:.0f} MB")
        print(sizes)
        print(f"target: under {LIMIT_S} s for 10000 images")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
