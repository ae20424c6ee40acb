"""kill -9 at random moments while two processes build one cache: what is there is whole, and a rerun completes it.

    python benchmarks/kill_cache.py [--kills 50] [--processes 2] [--images 40]

Each trial starts with no cache. The processes build it at the same time, with a stand-in for the VAE, and are killed
together. Then every cache file must be readable and right; a rerun must build exactly what was missing and leave what
was there untouched; and of what the killed processes had encoded, only so much may be lost as was between encoder and
file. The share of work that both did is printed: two runs on one cache should meet each other's entries.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if TYPE_CHECKING:
    from library.data.caching import CacheReport
    from library.data.stores import LatentStore
    from library.data.table import ImageTable

BATCH_SIZE = 2
SECONDS_PER_BATCH = 0.01


class Trial(NamedTuple):
    """A killed build and its rerun: entries on disk at the kill, encoded until then, built by the rerun."""

    there: int
    encoded: int
    rebuilt: int


def make_pictures(folder: Path, images: int) -> None:
    """Small PNGs of two shapes, different from each other."""
    import cv2
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(images):
        height, width = ((64, 64), (48, 80))[number % 2]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"p{number:03}.png"), pixels)


def build(table: ImageTable, encode: Callable, **options: Any) -> tuple[LatentStore, CacheReport]:
    """One caching pass over the pictures of a folder, without its progress bar."""
    from library.data.latent_caching import LatentCacheOptions, build_latents

    chosen = LatentCacheOptions(**({"vae_id": "stand-in", "to_disk": True, "batch_size": BATCH_SIZE} | options))
    with contextlib.redirect_stderr(io.StringIO()):
        return build_latents(table, lambda: encode, options=chosen)


def stand_in(pixels, noise):
    """Encodes like a VAE: the picture in small, and some of the noise."""
    import torch

    small = torch.nn.functional.avg_pool2d(pixels, 8)[:, [0, 1, 2, 0]]
    return small + 0.1 * noise, torch.ones(len(pixels), dtype=torch.bool)


def work(folder: Path, log: Path, options: dict[str, Any], ready: Any, go: Any) -> None:
    """What is killed: builds the cache and logs every image it has encoded."""

    from benchmarks.caching import table_of

    def slow(pixels, noise):
        time.sleep(SECONDS_PER_BATCH)
        with open(log, "ab", buffering=0) as file:
            file.write(b"x" * len(pixels))
        return stand_in(pixels, noise)

    table = table_of(folder, 64)
    ready.release()
    go.wait()
    build(table, slow, **options)


def start(folder: Path, logs: list[Path], options: dict[str, Any]) -> list[Any]:
    """Processes that begin to build at the same moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["library.data.latent_caching", "library.data.assemble", "benchmarks.kill_cache"])
    ready, go = context.Semaphore(0), context.Event()
    processes = [context.Process(target=work, args=(folder, log, options, ready, go)) for log in logs]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    go.set()
    return processes


def trial(folder: Path, rng: random.Random, *, processes: int, images: int, **options: Any) -> Trial:
    """Build, kill, look, run again. Raises AssertionError when something is torn, lost or done twice."""
    import torch

    from benchmarks.caching import table_of
    from library.io import latent_cache

    for file in folder.glob("*.npz"):
        file.unlink()
    (folder / ".sdxl_latents_index").unlink(missing_ok=True)
    logs = [folder.parent / f"log-{number}" for number in range(processes)]
    for log in logs:
        log.write_bytes(b"")
    running = start(folder, logs, options)
    time.sleep(rng.uniform(0, 3 * images * SECONDS_PER_BATCH / BATCH_SIZE / processes))
    for process in running:
        process.kill()
    for process in running:
        process.join()
    assert all(process.exitcode in (0, -signal.SIGKILL) for process in running), "a process failed by itself"
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("*.npz")}
    for path in before:
        latent_cache.read(path)  # raises when torn
    encoded = sum(log.stat().st_size for log in logs)
    again = []

    def count(pixels, noise):
        again.extend(range(len(pixels)))
        return stand_in(pixels, noise)

    store, report = build(table_of(folder, 64), count, **options)
    assert (report.built, report.reused, len(report.stale)) == (images - len(before), len(before), 0), report.text("")
    assert len(again) == images - len(before), "something was done twice"
    assert all((path.stat().st_mtime_ns, path.stat().st_ino) == facts for path, facts in before.items())
    whole, _ = build(table_of(folder, 64), stand_in, to_disk=False)
    for row in range(images):
        latents, right = (kind.get(row, flipped=False).latents_4hw for kind in (store, whole))
        assert torch.allclose(latents, right, atol=1e-6), row
    return Trial(len(before), encoded, report.built)


def main(argv: list[str] | None = None) -> int:
    """Print every trial and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    rng, trials = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        make_pictures(folder, given.images)
        for number in range(given.kills):
            done = trial(folder, rng, processes=given.processes, images=given.images)
            trials.append(done)
            print(
                f"kill {number + 1}: {done.there} whole, {done.encoded} encoded, rerun built {done.rebuilt}", flush=True
            )
    there = sum(done.there for done in trials)
    partial = sum(0 < done.there < given.images for done in trials)
    encoded = sum(done.encoded for done in trials)
    print(f"\n{given.kills} kills of {given.processes} processes, {given.images} images; {partial} left a part")
    print(f"{encoded} encoded, {there} of them stored once: {encoded - there} in flight or done by both processes")
    print("nothing torn, every rerun complete, nothing stored was done again")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
