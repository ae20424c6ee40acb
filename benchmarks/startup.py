"""Start-up at scale: listing a folder of images with captions, without and with its dataset index.

    python benchmarks/startup.py [--images 100000] [--caches] [--work_dir DIR] [--keep]

Makes one folder of small valid pictures (hard links to a few, each under its own name) with a caption file each, and
scans it in fresh processes: without an index, which opens every file; with the index that this left; and with it after
one image in a thousand has changed. With --caches the captions all differ, every image has cache files of latents
(1024 pixels) and text that the folder's indexes know, and a whole start is measured: scan, table, both caches, summary,
and the first batch with 0 and with 2 workers. Files are in the system's cache, so the times are those of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from library.config.dataset_spec import DatasetSpec
    from library.data.caching import CacheReport
    from library.data.latent_caching import LatentEncoder
    from library.data.records import ScanReport
    from library.data.stores import LatentStore, TextStore
    from library.data.table import ImageTable

Result = TypeVar("Result")

NAMES_PER_FILE = 10_000  # hard links; ext4 allows 65,000
CHANGED_EVERY = 1000


def make_folder(folder: Path, num_images: int) -> None:
    """Fill `folder`: three PNG files to one JPEG file, of five sizes, last changed an hour ago."""
    from PIL import Image

    folder.mkdir(parents=True)
    long_ago = time.time() - 3600
    source: dict[str, Path] = {}
    for number in range(num_images):
        if number % NAMES_PER_FILE == 0:
            source = {}
        kind = ".jpg" if number % 4 == 3 else ".png"
        for ending in (kind, ".txt"):
            target = folder / f"photo_{number:07d}{ending}"
            if ending in source:
                os.link(source[ending], target)
                continue
            if ending == ".txt":
                target.write_text(f"a photo of subject {number}, red, big, outside, by day\n", encoding="utf-8")
            else:
                Image.new("RGB", (64 + 16 * (number // NAMES_PER_FILE % 5), 48)).save(target)
            os.utime(target, (long_ago, long_ago))
            source[ending] = target


def make_caches(folder: Path, num_images: int) -> None:
    """Give every image a caption of its own and cache files (hard links to a few), and note these in the indexes."""
    import torch

    from library.io import latent_cache, text_cache
    from library.io.latent_cache import CacheCheck, LatentEntry
    from library.io.text_cache import TextEntry

    scene = "red, big, outside, by day, standing on a hill, looking at the viewer"
    for number in range(num_images):
        caption = folder / f"photo_{number:07d}.txt"
        caption.unlink()
        caption.write_text(f"a photo of subject {number}, {scene}, tag {number % 977}\n", encoding="utf-8")
    long_ago = time.time() - 3600
    for number in range(num_images):
        os.utime(folder / f"photo_{number:07d}.txt", (long_ago, long_ago))
    table, _ = scanned(str(folder))
    text = TextEntry(torch.zeros(77, 768), torch.zeros(77, 1280), torch.zeros(1280))
    for number, image in enumerate(table):
        record, bucket = image.record, image.placement.bucket
        paths = latent_cache.latent_cache_path(record.path, record.size), text_cache.text_cache_path(record.path)
        if number % NAMES_PER_FILE == 0:
            sources = paths
            latents = torch.zeros(4, bucket.h // 8, bucket.w // 8)
            latent_cache.write(paths[0], LatentEntry(latents, None, record.size, (0.0, 0.0, 0.0, 0.0)), "{}")
            text_cache.write(paths[1], text, "{}")
            continue
        for source, path in zip(sources, paths, strict=True):
            os.link(source, path)
    # The files are taken for what they should be; the indexes are written by the code that always does.
    latent_cache.inspect = text_cache.inspect = lambda *_, **__: CacheCheck("valid")
    reports = [open_cache(table)[1] for open_cache in (open_latents, open_text)]
    assert [report.reused for report in reports] == [num_images] * 2


def scanned(folder: str) -> tuple[ImageTable, ScanReport]:
    """The table of the folder's images in buckets of 1024 pixels."""
    from library.data.assemble import assemble

    return assemble([described(folder)])


def described(folder: str) -> DatasetSpec:
    """The folder as a data set."""
    from library.config.dataset_spec import DatasetSpec, SubsetSpec
    from library.sizes import Size

    limits = {"min_bucket_reso": 256, "max_bucket_reso": 2048, "bucket_reso_steps": 64, "bucket_no_upscale": False}
    subsets = (SubsetSpec(image_dir=folder, caption_extension=".txt"),)
    return DatasetSpec(subsets=subsets, batch_size=4, resolution=Size(1024, 1024), enable_bucket=True, **limits)


def open_latents(table: ImageTable) -> tuple[LatentStore, CacheReport]:
    """The cache of latents; nothing may be missing."""
    from library.data.latent_caching import LatentCacheOptions, build_latents

    return build_latents(table, refused, options=LatentCacheOptions("vae", to_disk=True))


def refused() -> LatentEncoder:
    """What stands for the VAE."""
    raise AssertionError("all latents are in the cache")


def open_text(table: ImageTable) -> tuple[TextStore, CacheReport]:
    """The cache of encoded captions; only the empty caption is encoded."""
    import torch

    from library.data.text_caching import TextCacheOptions, build_text
    from library.diffusion.conditioning import TextCond

    def encode(captions: list[str]) -> TextCond:
        assert captions == [""], "every caption is in the cache"
        return TextCond(torch.zeros(1, 77, 2048), torch.zeros(1, 1280))

    return build_text(table, encode, options=TextCacheOptions("encoders", 768, to_disk=True))


def start_once(folder: str) -> None:
    """Start in this process from complete caches; print the steps' seconds and memory as JSON, one line each."""
    import torch  # noqa: F401  (a trainer has loaded it by then)

    from library.data.dataset import DataSettings, TrainData
    from library.models.families import sdxl
    from library.models.tokenizers import load_tokenizer

    before = resident()
    table, report = measured("scan and table", lambda: scanned(folder), before=before)
    latents, _ = measured("latents cache", lambda: open_latents(table), before=before)
    text, _ = measured("text cache", lambda: open_text(table), before=before)

    def first_batch(num_workers: int) -> TrainData:
        settings = DataSettings(seed=1, num_workers=num_workers)
        data = TrainData([described(folder)], table, scan_report=report, settings=settings)
        data.attach_latents(latents)
        data.attach_text(text)
        groups = data.epoch(0)
        batch = next(groups).micro_batches[0]
        assert batch.latents_B4hw is not None and batch.text is not None and batch.num_real == len(batch)
        groups.close()
        return data

    data = measured("first batch, 0 workers", lambda: first_batch(0), before=before)
    measured("first batch, 2 workers", lambda: first_batch(2), before=before)
    measured("summary", data.summary, before=before)
    measured("metadata of the network", data.ss_metadata, before=before)
    tokenizer = load_tokenizer()
    settings = DataSettings(seed=1, count_tokens=lambda captions: sdxl.count_tokens(tokenizer, captions))
    counting = TrainData([described(folder)], table, scan_report=report, settings=settings)
    measured("summary with tokens", counting.summary, before=before)


def measured(step: str, work: Callable[[], Result], *, before: int) -> Result:
    """Do the work; print what it took."""
    begin, computing = time.perf_counter(), time.process_time()
    result = work()
    facts = {"seconds": time.perf_counter() - begin, "computing": time.process_time() - computing}
    print(json.dumps({"step": step, **facts, "peak": peak_resident() - before, "after": resident() - before}))
    return result


def touch_some(folder: Path, num_images: int) -> None:
    """Replace every so-manieth image by a copy with another time."""
    for number in range(0, num_images, CHANGED_EVERY):
        path = folder / f"photo_{number:07d}.png"
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)


def scan_once(folder: str) -> None:
    """Scan in this process; print seconds, images and growth of the resident memory as JSON."""
    from library.config.dataset_spec import SubsetSpec
    from library.data.records import ScanReport
    from library.data.sources.folders import scan

    options = {"num_repeats": 1, "caption_extension": ".txt", "is_reg": False, "class_tokens": None}
    subset = SubsetSpec(image_dir=folder, **options)
    report = ScanReport()
    before = resident()
    begin, computing = time.perf_counter(), time.process_time()
    count = sum(1 for _ in scan(subset, report=report))
    seconds, computing = time.perf_counter() - begin, time.process_time() - computing
    assert not report.skipped and not report.missing_captions
    facts = {"seconds": seconds, "computing": computing, "images": count}
    print(json.dumps({**facts, "peak": peak_resident() - before, "after": resident() - before}))


def resident() -> int:
    """Resident memory of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """The most that it has ever been, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report_scans(folder: Path, num_images: int) -> None:
    """Scan three times, print a table."""
    print("| scan | s | s of the processor | of it us per image | peak bytes per image | bytes after |")
    print("|---|---|---|---|---|---|")
    for title, change in (("first", None), ("second", None), ("0.1% changed", touch_some)):
        if change:
            change(folder, num_images)
        (found,) = in_fresh_process("--scan", str(folder))
        assert found["images"] == num_images
        print_row(title, found, num_images)


def report_start(folder: Path, num_images: int) -> None:
    """Make caches, start, print a table."""
    in_fresh_process("--make", str(folder), "--images", str(num_images))
    print(f"load of the machine: {os.getloadavg()[0]:.1f}\n")
    print("| step | s | s of the processor | of it us per image | peak bytes per image so far | bytes after |")
    print("|---|---|---|---|---|---|")
    for found in in_fresh_process("--start", str(folder)):
        print_row(found["step"], found, num_images)


def in_fresh_process(*arguments: str) -> list[dict]:
    """Run this script with other arguments; the JSON lines that it prints."""
    command = [sys.executable, __file__, *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def print_row(title: str, found: dict, num_images: int) -> None:
    """One row of a table; bytes are those by which the process has grown."""
    each, peak, after = (found[what] / num_images for what in ("computing", "peak", "after"))
    times = f"{found['seconds']:.2f} | {found['computing']:.2f} | {each * 1e6:.2f}"
    print(f"| {title} | {times} | {peak:.0f} | {after:.0f} |", flush=True)


def main() -> None:
    """Make the folder, scan it three times, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--work_dir", type=Path, help="where to make the folder (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    parser.add_argument("--caches", action="store_true", help="measure a whole start from complete caches")
    parser.add_argument("--scan", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--start", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--make", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scan:
        return scan_once(arguments.scan)
    if arguments.start:
        return start_once(arguments.start)
    if arguments.make:
        return make_caches(Path(arguments.make), arguments.images)
    from benchmarks._machine import machine_class

    base = Path(tempfile.mkdtemp(dir=arguments.work_dir))
    folder = base / "images"
    try:
        begin = time.perf_counter()
        make_folder(folder, arguments.images)
        made = time.perf_counter() - begin
        print(f"{arguments.images} images with captions (made in {made:.0f} s), {machine_class(with_gpu=False)}\n")
        if arguments.caches:
            report_start(folder, arguments.images)
        else:
            report_scans(folder, arguments.images)
    finally:
        if arguments.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(base)


if __name__ == "__main__":
    main()
