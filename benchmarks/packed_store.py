"""The packed cache against its promises: opening a million entries, and reading batches against npz files.

    python benchmarks/packed_store.py [--entries 1000000] [--samples 256] [--repeats 7] [--folder DIR]

Opening is measured in a process of its own: index, positions of all ids in random order, facts compared with what is
expected; the memory is what the process holds more than before, mapped pages of the index included, less the ids and
expectations that the caller brings. Batches are 8 samples of 1024-pixel latents and 77 text tokens in a warm file
cache, as tensors: npz entries as the trainer reads them, stacked, against `PackedStore.read_batch`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if TYPE_CHECKING:
    from torch import Tensor

FACTS = np.dtype(
    [("bytes", "<i8"), ("mtime_ns", "<i8"), ("hash", "u1", (16,)), ("bucket", "<u4", (2,)), ("resized", "<u4", (2,))]
)
BATCH = 8
SHAPES = {"hidden_state1": (77, 768), "hidden_state2": (77, 1280), "pool2": (1280,)}
PER_SHARD = 50_000


def synthetic(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and facts of `count` entries that do not exist, always the same."""
    ids = np.random.default_rng(0).permutation(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    facts = np.zeros(count, FACTS)
    facts["bytes"] = np.arange(count) + 100_000
    facts["mtime_ns"] = ids % np.uint64(1 << 60)
    facts["bucket"] = facts["resized"] = 1024
    return ids, facts


def write_synthetic(folder: Path, ids: np.ndarray, facts: np.ndarray, *, recipe: str = "{}") -> None:
    """Write shards as PackedWriter does, but all records of a shard at once: one is the pattern of the others."""
    from library.io import packed_record as fmt

    folder.mkdir(parents=True)
    body = {"latents": np.ones((4, 2, 2), np.float16)}
    pattern, _ = fmt.encode_record(0, body, key="images/0000000.png", facts=facts[0].tobytes(), stamp=0)
    for first in range(0, len(ids), PER_SHARD):
        numbers = np.arange(first, min(first + PER_SHARD, len(ids)))
        rows = np.tile(np.frombuffer(pattern, np.uint8), (len(numbers), 1))
        rows[:, 8:16] = ids[numbers, None].view(np.uint8)
        rows[:, 16:24] = (numbers + 1).astype("<u8")[:, None].view(np.uint8)
        key_at = fmt.FIXED.size + facts.dtype.itemsize
        rows[:, fmt.FIXED.size : key_at] = facts[numbers].view(np.uint8).reshape(len(numbers), -1)
        digits = np.char.zfill(numbers.astype("S7"), 7)
        rows[:, key_at + 7 : key_at + 14] = digits.view(np.uint8).reshape(-1, 7)
        head = len(pattern) - fmt.ALIGN
        whole = bytearray(rows.tobytes())
        with memoryview(whole) as view:
            for start in range(0, len(whole), len(pattern)):
                struct.pack_into("<I", whole, start + fmt.FIXED.size - 4, fmt.head_crc(view, start, head))
        (folder / f"{first:016x}-0-bench{fmt.SHARD_SUFFIX}").write_bytes(
            fmt.encode_shard_header(recipe, facts.dtype) + whole
        )


def resident_bytes() -> int:
    """Memory of this process that is in use now, mapped files included."""
    import psutil

    return psutil.Process().memory_info().rss


def open_and_compare(folder: Path, count: int) -> dict[str, float]:
    """What a start does with the cache: open, look up every id, compare the facts. Seconds and bytes per image."""
    from library.io.packed_store import PackedStore

    PackedStore.open(folder / "nothing", facts_dtype=FACTS)  # what is imported late is not the cache's memory
    ids, expected = synthetic(count)
    shuffled = np.random.default_rng(1).permutation(count)
    ids, expected = ids[shuffled], expected[shuffled]
    before, start = resident_bytes(), time.perf_counter()
    store = PackedStore.open(folder, facts_dtype=FACTS)
    opened = time.perf_counter()
    positions = store.find(ids)
    found = time.perf_counter()
    facts = store.facts(positions)
    valid = (positions >= 0) & (facts["bytes"] == expected["bytes"]) & (facts["mtime_ns"] == expected["mtime_ns"])
    valid &= (facts["bucket"] == expected["bucket"]).all(axis=1) & (facts["resized"] == expected["resized"]).all(axis=1)
    compared = time.perf_counter()
    assert valid.all() and store.save_index()
    peak = resident_bytes()
    del facts, valid
    return {
        "open_s": opened - start,
        "find_s": found - opened,
        "facts_s": compared - found,
        "total_s": compared - start,
        "bytes_per_image": (resident_bytes() - before) / count,
        "bytes_per_image_with_facts": (peak - before) / count,
    }


def measure_opening(folder: Path, count: int, label: str) -> None:
    """Run `open_and_compare` in a fresh process and print what it says."""
    command = [sys.executable, __file__, "--open", str(folder), "--entries", str(count)]
    result = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    print(
        f"{label}: {result['total_s']:.2f} s (open {result['open_s']:.2f}, find {result['find_s']:.2f}, facts "
        f"{result['facts_s']:.2f}), resident per image {result['bytes_per_image']:.0f} bytes"
        f" ({result['bytes_per_image_with_facts']:.0f} while the facts are compared)",
        flush=True,
    )


class Caches:
    """The same samples in npz files and in packed stores; text of the npz files as float32 and as float16."""

    def __init__(self, folder: Path, samples: int) -> None:
        import torch

        from library.io import latent_cache, text_cache
        from library.io.packed_store import PackedStore
        from library.io.packed_writer import PackedWriter
        from library.sizes import Size

        self.folder = folder
        generator = torch.Generator().manual_seed(0)
        with (
            PackedWriter(folder / "latents", recipe="{}") as latents_writer,
            PackedWriter(folder / "text", recipe="{}") as text_writer,
        ):
            for number in range(samples):
                latents = torch.randn(4, 128, 128, generator=generator)
                text = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
                halves = {name: tensor.half() for name, tensor in text.items()}
                entry = latent_cache.LatentEntry(latents, None, Size(1024, 1024), (0.0, 0.0, 1024.0, 1024.0))
                latent_cache.write(self.npz("latents", number), entry, "{}")
                text_cache.write(self.npz("float32", number), text_cache.TextEntry(**text), "{}")
                text_cache.write(self.npz("float16", number), text_cache.TextEntry(**halves), "{}")
                latents_writer.append(number, {"latents": latents.half().numpy()})
                text_writer.append(number, {name: tensor.numpy() for name, tensor in halves.items()})
        self.latents, self.text = PackedStore.open(folder / "latents"), PackedStore.open(folder / "text")

    def npz(self, kind: str, number: int) -> Path:
        """The file of one sample."""
        return self.folder / f"{number:06d}_{kind}.npz"

    def from_npz(self, batch: list[int], text_dtype: str) -> dict[str, Tensor]:
        """A batch out of per-image files."""
        import torch

        from library.io import latent_cache, text_cache

        latents = [latent_cache.read(self.npz("latents", number)).latents_4hw for number in batch]
        text = [text_cache.read(self.npz(text_dtype, number)) for number in batch]
        stacked = {name: torch.stack([getattr(entry, name) for entry in text]) for name in SHAPES}
        return {"latents": torch.stack(latents), **stacked}

    def from_packed(self, batch: list[int], *, widened: bool = False) -> dict[str, Tensor]:
        """The same batch out of the packed stores, float16 unless `widened` to float32 as a whole."""
        import torch

        arrays = self.latents.read_batch(batch, ["latents"]) | self.text.read_batch(batch, SHAPES)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {name: tensor.float() for name, tensor in tensors.items()} if widened else tensors


def compare_reading(folder: Path, *, samples: int, repeats: int) -> None:
    """Print milliseconds per batch of each way, and the ratios, taken within each round."""
    import torch

    torch.set_num_threads(1)
    caches = Caches(folder, samples)
    ways = {
        "npz, text float32": lambda batch: caches.from_npz(batch, "float32"),
        "npz, text float16": lambda batch: caches.from_npz(batch, "float16"),
        "packed": caches.from_packed,
        "packed, widened to float32": lambda batch: caches.from_packed(batch, widened=True),
    }
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):  # the first one fills the file cache and maps the shards
        batches = (
            np.random.default_rng(number).permutation(samples)[: samples // BATCH * BATCH].reshape(-1, BATCH).tolist()
        )
        for name, way in ways.items():
            start = time.perf_counter()
            for batch in batches:
                way(batch)
            if number:
                rounds[name].append((time.perf_counter() - start) / len(batches))
    for name, times in rounds.items():
        middle, fastest, slowest = (1e3 * function(times) for function in (statistics.median, min, max))
        print(f"{name}: {middle:.2f} ms per batch ({fastest:.2f} to {slowest:.2f})")
    for slow in list(ways)[:2]:
        for fast in list(ways)[2:]:
            ratios = sorted(a / b for a, b in zip(rounds[slow], rounds[fast]))
            print(f"{slow} / {fast}: {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")


def main(argv: list[str] | None = None) -> int:
    """Measure both and print every figure."""
    from benchmarks._machine import machine_class

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000, help="synthetic entries to open")
    parser.add_argument("--samples", type=int, default=256, help="samples to read in batches of 8")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of reading")
    parser.add_argument("--folder", help="where to write (a temporary folder inside; default: the system's)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.open:
        print(json.dumps(open_and_compare(given.open, given.entries)))
        return 0
    print(f"on {machine_class()}\n")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        write_synthetic(folder / "million", *synthetic(given.entries))
        print(f"{given.entries} synthetic entries written in {time.perf_counter() - start:.1f} s")
        measure_opening(folder / "million", given.entries, "without an index (all shards are scanned)")
        for _ in range(3):
            measure_opening(folder / "million", given.entries, "with the index")
        print()
        compare_reading(folder, samples=given.samples, repeats=given.repeats)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
