"""What training has of a packed cache: a start with a complete one of a million images, and batches against npz files.

    python benchmarks/packed_training.py [--images 1000000] [--samples 256] [--repeats 7] [--folder DIR]

The start is measured in a process of its own, beginning with the table of images: which entries there are to be, their
ids, opening the store, looking, and the store that batches read from. Memory is what the process holds more than
before. Batches are built by the trainer's BatchBuilder from latents of 1024 x 1024 pixels and 77 text tokens, 8
samples each, in a warm file cache; one caption per image.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if TYPE_CHECKING:
    from library.data.collate import BatchBuilder, Work
    from library.data.table import ImageTable

BATCH = 8


def table_of(count: int, *, side: int) -> ImageTable:
    """A table of square images that do not exist, each with a caption of its own."""
    from library.config.dataset_file import SubsetSpec
    from library.data.buckets import Placement
    from library.data.records import FileStamp, ImageRecord, PlacedImage
    from library.data.table import ImageTable
    from library.sizes import Size

    size = Size(side, side)
    spec = SubsetSpec("images", **_subset_values())

    def images() -> Iterator[PlacedImage]:
        for number in range(count):
            name = f"images/{number:07d}.png"
            record = ImageRecord(
                name, f"data/{name}", size, f"a picture of thing {number}", spec, stamp=FileStamp(number + 1, number)
            )
            yield PlacedImage(record, Placement(size, size, 0.0), 0)

    return ImageTable(images())


def _subset_values() -> dict[str, Any]:
    return {
        "num_repeats": 1, "class_tokens": None, "is_reg": False, "caption_extension": ".txt", "caption_separator": ",",
        "shuffle_caption": False, "keep_tokens": 0, "keep_tokens_separator": "", "caption_prefix": None,
        "caption_suffix": None, "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0,
        "caption_tag_dropout_rate": 0.0, "flip_aug": False, "random_crop": False, "resize_interpolation": None,
        "custom_attributes": {},
    }  # fmt: skip


def write_cache(folder: Path, count: int) -> None:
    """A packed cache with an entry for every image of `table_of(count, side=16)`."""
    from benchmarks.packed_store import write_synthetic
    from library.data.packed_entries import FACTS, latent_ids, recipe

    table = table_of(count, side=16)
    facts = np.zeros(count, FACTS)
    facts["bytes"], facts["mtime_ns"] = table.stamps.T
    facts["bucket"] = facts["resized"] = facts["original"] = 16
    write_synthetic(folder / "latents", latent_ids(table, table.rows), facts, recipe=recipe("vae"))


def start(folder: Path, count: int) -> dict[str, float]:
    """What a run does between scanning and training when everything is cached. Seconds, and bytes per image."""
    from benchmarks.packed_store import resident_bytes
    from library.data.cache_places import CachePlace
    from library.data.latent_caching import LatentCacheOptions, LatentPass, build_latents

    place = CachePlace("packed", folder)
    options = LatentCacheOptions("vae", to_disk=True, place=place)
    build_latents(table_of(1, side=16), _no_encoder, options=options)  # what is imported late is not the cache's
    table = table_of(count, side=16)
    before, begin = resident_bytes(), time.perf_counter()
    work = LatentPass(table, options)
    opened = time.perf_counter()
    checks = work.backend.look(rank=0, world=1)
    looked = time.perf_counter()
    assert all(check.status == "valid" for check in checks)
    work.backend.share()
    del work, checks
    again = time.perf_counter()
    store, report = build_latents(table, _no_encoder, options=options)
    whole = time.perf_counter() - again
    assert report.reused == count and store.has(np.arange(count)).all()
    return {
        "targets_ids_open_s": opened - begin,
        "look_s": looked - opened,
        "whole_s": whole,
        "bytes_per_image": (resident_bytes() - before) / count,
    }


def _no_encoder() -> Any:
    raise AssertionError("everything is cached")


def measure_start(folder: Path, count: int, label: str) -> None:
    """Run `start` in a fresh process and print what it says."""
    command = [sys.executable, __file__, "--start", str(folder), "--images", str(count)]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    print(
        f"{label}: {found['targets_ids_open_s']:.2f} s for entries, ids and opening, {found['look_s']:.2f} s to look; "
        f"the whole pass {found['whole_s']:.2f} s, {found['bytes_per_image']:.0f} bytes resident per image",
        flush=True,
    )


def builders(folder: Path, table: ImageTable) -> dict[str, BatchBuilder]:
    """The trainer's builder over npz files and over packed stores that hold the same."""
    import torch

    from library.data.cache_places import CachePlace
    from library.data.collate import BatchBuilder
    from library.data.latent_caching import LatentCacheOptions, build_latents
    from library.data.text_caching import TextCacheOptions, build_text
    from library.diffusion.conditioning import TextCond

    generator = torch.Generator().manual_seed(0)

    def encode_image(pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return noise, torch.ones(len(noise), dtype=torch.bool)

    def encode_text(captions: list[str]) -> TextCond:
        rows = len(captions)
        return TextCond(torch.randn(rows, 77, 2048, generator=generator), torch.randn(rows, 1280, generator=generator))

    found = {}
    for store in ("npz", "packed"):
        place = CachePlace(store, folder / store)
        latents, _ = build_latents(
            table,
            lambda: encode_image,
            options=LatentCacheOptions("vae", to_disk=True, batch_size=4, place=place),
        )
        text, _ = build_text(table, encode_text, options=TextCacheOptions("te", 768, to_disk=True, place=place))
        found[store] = BatchBuilder(table, seed=0, legacy_crop=False, latents=latents, text=text)
    return found


def works(samples: int, number: int) -> list[Work]:
    """The batches of a round: every image once, in an order of its own."""
    from library.data.batching import RankRows, Row
    from library.data.collate import Work
    from library.sizes import Size

    order = np.random.default_rng(number).permutation(samples)[: samples // BATCH * BATCH].reshape(-1, BATCH)
    size = Size(1024, 1024)
    return [Work(number, RankRows(size, tuple(Row(image, 0) for image in rows), BATCH)) for rows in order.tolist()]


def compare_batches(folder: Path, *, samples: int, repeats: int) -> None:
    """Print milliseconds per batch of each store, and the ratio within each round."""
    import cv2
    import torch

    torch.set_num_threads(1)
    table = table_of(samples, side=1024)
    picture = np.zeros((1024, 1024, 3), np.uint8)
    base = folder / "data" / "images"
    base.mkdir(parents=True)
    data = cv2.imencode(".png", picture)[1].tobytes()
    for number in range(samples):
        (base / f"{number:07d}.png").write_bytes(data)
    import os

    os.chdir(folder)
    ways = builders(folder, table)
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):  # the first one fills the file cache and maps the shards
        for name, builder in ways.items():
            begin = time.perf_counter()
            batches = works(samples, number)
            for work in batches:
                assert builder[work].num_real == BATCH
            if number:
                rounds[name].append((time.perf_counter() - begin) / len(batches))
    for name, times in rounds.items():
        middle, fastest, slowest = (1e3 * function(times) for function in (statistics.median, min, max))
        print(f"{name}: {middle:.2f} ms per batch of {BATCH} ({fastest:.2f} to {slowest:.2f})")
    ratios = sorted(a / b for a, b in zip(rounds["npz"], rounds["packed"], strict=True))
    print(f"npz / packed: {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")


def main(argv: list[str] | None = None) -> int:
    """Measure both and print every figure."""
    from benchmarks._machine import machine_class

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, help="images of the complete cache")
    parser.add_argument("--samples", type=int, default=256, help="samples to read in batches of 8")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of reading")
    parser.add_argument("--folder", help="where to write (a temporary folder inside; default: the system's)")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.start:
        print(json.dumps(start(given.start, given.images)))
        return 0
    print(f"on {machine_class()}\n")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        compare_batches(folder, samples=given.samples, repeats=given.repeats)
        print()
        write_cache(folder / "million", given.images)
        measure_start(folder / "million", given.images, "without an index (all shards are scanned)")
        for _ in range(3):
            measure_start(folder / "million", given.images, "with the index")
    return 0


if __name__ == "__main__":
    sys.exit(main())
