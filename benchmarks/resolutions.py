"""What it costs an epoch that every visit of an image draws its resolution.

python benchmarks/resolutions.py [--images 1000000] [--epochs 5]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def table_of(images: int, resolutions: int):
    """Records that no file stands behind, in one bucket for each resolution, and their data set."""
    from library.config.dataset_file import DatasetSpec, SubsetSpec
    from library.data.buckets import Placement
    from library.data.records import ImageRecord, PlacedImage
    from library.data.table import ImageTable
    from library.sizes import Size

    sizes = [Size(512, 512), Size(768, 768), Size(1024, 1024)][:resolutions]
    subset = SubsetSpec("x")
    spec = DatasetSpec(4, sizes[0], True, 256, 1024, 64, False, (subset,), other_resolutions=tuple(sizes[1:]))

    def rows() -> Iterator[PlacedImage]:
        for image in range(images):
            record = ImageRecord(f"x/{image}.png", f"/x/{image}.png", Size(1024, 1024), "", subset)
            for number, size in enumerate(sizes):
                yield PlacedImage(record, Placement(size, size, 0.0), 0, number)

    return ImageTable(rows()), spec


def seconds(work: Callable[..., object], *arguments: object, **settings: object) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work(*arguments, **settings)
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    """Print one line per number of resolutions: medians over the epochs after the first.

    Counting the steps of an epoch, making its pools, and putting its steps in order.
    """
    from benchmarks._machine import machine_class
    from library.data.batching import epoch_plan
    from library.data.epochs import EpochPools

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args(argv)
    print(f"{args.images:,} images, {args.epochs} epochs, on {machine_class(with_gpu=False)}\n")
    print("| resolutions | first epoch s | counting s | pools s | order s |\n|---|---|---|---|---|")
    for resolutions in (1, 3):
        table, spec = table_of(args.images, resolutions)
        pools = EpochPools(table, [spec], seed=1)
        first = seconds(pools.pools, 0)
        times = []
        for epoch in range(1, args.epochs + 1):
            counting = seconds(pools.micro_batches, epoch, world=1)
            making = seconds(pools.pools, epoch)
            made = pools.pools(epoch)
            order = seconds(epoch_plan, made, world=1, accumulation=1, seed=1, epoch=epoch)
            times.append((counting, making, order))
        medians = " | ".join(f"{statistics.median(column):.2f}" for column in zip(*times, strict=True))
        print(f"| {resolutions} | {first:.2f} | {medians} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
