"""Start-up at scale: listing a folder of images with captions, without and with its dataset index.

    python benchmarks/startup.py [--images 100000] [--work_dir DIR] [--keep]

Makes one folder of small valid pictures (hard links to a few, each under its own name) with a caption file each, and
scans it in fresh processes: without an index, which opens every file; with the index that this left; and with it after
one image in a thousand has changed. Files are in the system's cache, so the times are those of the processor.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

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


def main() -> None:
    """Make the folder, scan it three times, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--work_dir", type=Path, help="where to make the folder (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    parser.add_argument("--scan", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scan:
        scan_once(arguments.scan)
        return
    from benchmarks._machine import machine_class

    base = Path(tempfile.mkdtemp(dir=arguments.work_dir))
    folder = base / "images"
    try:
        begin = time.perf_counter()
        make_folder(folder, arguments.images)
        made = time.perf_counter() - begin
        print(f"{arguments.images} images with captions (made in {made:.0f} s), {machine_class(with_gpu=False)}\n")
        print("| scan | s | s of the processor | of it us per image | peak bytes per image | bytes after |")
        print("|---|---|---|---|---|---|")
        for title, change in (("first", None), ("second", None), ("0.1% changed", touch_some)):
            if change:
                change(folder, arguments.images)
            command = [sys.executable, __file__, "--scan", str(folder)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            assert found["images"] == arguments.images
            each, peak, after = (found[what] / arguments.images for what in ("computing", "peak", "after"))
            times = f"{found['seconds']:.2f} | {found['computing']:.2f} | {each * 1e6:.2f}"
            print(f"| {title} | {times} | {peak:.0f} | {after:.0f} |", flush=True)
    finally:
        if arguments.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(base)


if __name__ == "__main__":
    main()
