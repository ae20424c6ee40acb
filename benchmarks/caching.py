"""Building a latents cache: the pass against decoding, encoding and writing one image after the other.

    python benchmarks/caching.py [--images 500] [--resolution 128] [--batch_size 4] [--block 50] [--threads 2]

JPEG photos of 3 megapixels (soft shapes and sensor noise, quality 92, about 1 MB each) are made in a temporary folder
by several processes. Both sides encode with the tiny VAE on the CPU and write npz files. In sequence means: decode the
whole JPEG, resize, encode, write, then the next image. The images are split into blocks; both sides work on the same
block in turn, so a change of the machine's load hits both, and the ratio is taken within each pair. On a machine that
is shared use --threads 1: several torch threads wait for each other, which slows one image at a time down most.

Also printed: how long the encoder waited for images, and what each part of the work costs alone, which says what the
limit is. The tiny VAE's own resolution is 128, where encoding costs about as much as decoding a photo, as with SDXL's
VAE on a GPU. At 512 it takes 15 times as long as decoding: both sides then do little else than encode.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if TYPE_CHECKING:
    from library.data.table import ImageTable

WIDTH, HEIGHT = 2048, 1536


def write_photo(path: Path) -> None:
    """A JPEG whose spectrum falls like that of a photo, with noise."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(int(path.stem[1:]))
    image = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.float32)
    for cells, strength in ((4, 90), (16, 40), (64, 25), (256, 14), (1024, 8)):
        coarse = rng.normal(0, strength, (cells * 3 // 4, cells, 3)).astype(np.float32)
        image += cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    image += rng.normal(0, 3, image.shape)
    pixels = image.clip(0, 255).astype(np.uint8)
    cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])


def make_blocks(folder: Path, *, images: int, block: int) -> list[Path]:
    """The photos, `block` to a folder."""
    paths = [folder / f"{number // block:03}" / f"p{number:05}.jpg" for number in range(images)]
    for parent in {path.parent for path in paths}:
        parent.mkdir()
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_photo, paths, chunksize=4))
    return sorted({path.parent for path in paths})


def table_of(folder: Path, resolution: int) -> ImageTable:
    """The images of a folder in buckets."""
    from library.config.cli import parse
    from library.config.dataset_file import dataset_specs
    from library.data.assemble import assemble
    from library.io.atomic import write_text

    file = folder.with_suffix(".toml")
    write_text(
        file,
        f"[[datasets]]\nresolution = {resolution}\nenable_bucket = true\nmin_bucket_reso = 64\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder}'\nclass_tokens = 'x'\n",
    )
    settings = ["--pretrained_model_name_or_path", "tiny", "--dataset_config", str(file), "--cache_latents"]
    return assemble(dataset_specs(parse("cache_latents", settings)))[0]


class Encoder:
    """The tiny VAE; keeps the time it worked and the time between its calls."""

    def __init__(self) -> None:
        from library.inference.encode_pass import latent_encoder
        from library.models import checkpoint

        bundle = checkpoint.load_bundle("tiny", parts=("vae",))
        self.vae_id = bundle.vae_id()
        self._encode = latent_encoder(bundle.vae, device="cpu")
        self.begin()

    def begin(self) -> None:
        """Count from here on."""
        self.busy = self.idle = 0.0
        self._last: float | None = None

    def __call__(self, pixels, noise):
        start = time.perf_counter()
        if self._last is not None:
            self.idle += start - self._last
        result = self._encode(pixels, noise)
        self._last = time.perf_counter()
        self.busy += self._last - start
        return result


def in_sequence(table: ImageTable, encoder: Encoder, costs: dict[str, float]) -> None:
    """Decode, resize, encode, write; one image at a time. Adds up what each costs."""
    import torch

    from library.data.latent_caching import posterior_noise
    from library.data.pixels import to_pixels
    from library.data.transforms import apply_crop, crop_info, read_record
    from library.diffusion.crops import legacy_crop_ltrb
    from library.io import fingerprint, latent_cache

    for image in table:
        record = image.record
        times = [time.perf_counter()]
        whole = read_record(record)
        times.append(time.perf_counter())
        crop = crop_info(image.record.size, image.placement, flipped=False)
        pixels = to_pixels(apply_crop(whole, crop))
        times.append(time.perf_counter())
        latents, _ = encoder(pixels[None], posterior_noise([image], "plain"))
        times.append(time.perf_counter())
        box = legacy_crop_ltrb(image.placement.bucket, record.size)
        entry = latent_cache.LatentEntry(latents[0].clone(), None, record.size, box)
        made_from = fingerprint.latent_fingerprint(
            image=fingerprint.image_stamp(record.path, with_hash=True),
            bucket=crop.target,
            resized=crop.resized,
            crop=(crop.left, crop.top),
            vae_id=encoder.vae_id,
        )
        latent_cache.write(latent_cache.latent_cache_path(record.path, record.size), entry, made_from)
        times.append(time.perf_counter())
        for name, start, end in zip(("decode", "resize", "encode", "write"), times, times[1:], strict=False):
            costs[name] = costs.get(name, 0.0) + end - start
    assert torch.isfinite(latents).all()


def with_pass(table: ImageTable, encoder: Encoder, batch_size: int) -> None:
    """The caching pass."""
    from library.data.latent_caching import LatentCacheOptions, build_latents

    options = LatentCacheOptions(encoder.vae_id, to_disk=True, batch_size=batch_size)
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
        _, report = build_latents(table, lambda: encoder, options=options)
    assert report.built == len(table), report.line()


def timed(folder: Path, work) -> float:
    """Seconds of `work` on a folder without cache files."""
    for file in (*folder.glob("*.npz"), folder / ".sdxl_latents_index"):
        file.unlink(missing_ok=True)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    """Print every pair, the median ratio, and what the limit is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--block", type=int, default=50, help="images of a block, on which both sides work in turn")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of both sides; 0: torch's own choice")
    given = parser.parse_args(argv)
    import torch

    from benchmarks._machine import machine_class

    if given.threads:
        torch.set_num_threads(given.threads)
    encoder, costs, pairs = Encoder(), {}, []
    busy = idle = 0.0
    with tempfile.TemporaryDirectory() as name:
        blocks = make_blocks(Path(name), images=given.images, block=given.block)
        tables = {folder: table_of(folder, given.resolution) for folder in blocks}
        warm_up = {}
        in_sequence(tables[blocks[0]][:4], encoder, warm_up)
        for number, folder in enumerate(blocks):
            sides = [
                partial(in_sequence, tables[folder], encoder, costs),
                partial(with_pass, tables[folder], encoder, given.batch_size),
            ]
            times = [0.0, 0.0]
            for side in (0, 1) if number % 2 else (1, 0):
                encoder.begin()
                times[side] = timed(folder, sides[side])
                if side == 1:
                    busy, idle = busy + encoder.busy, idle + encoder.idle
            pairs.append(times)
            rates = [given.block / seconds for seconds in times]
            print(f"block {number + 1}: in sequence {rates[0]:.1f} images/s, pass {rates[1]:.1f} images/s", flush=True)
    ratios = sorted(slow / fast for slow, fast in pairs)
    print(f"\n{given.images} photos of {WIDTH} x {HEIGHT}, resolution {given.resolution}, {machine_class()}")
    print(f"torch threads {torch.get_num_threads()}, batch {given.batch_size}")
    alone = ", ".join(f"{name} {1000 * seconds / given.images:.1f} ms" for name, seconds in costs.items())
    print(f"an image in sequence: {alone}")
    print(f"the pass's encoder worked {busy:.1f} s and waited {idle:.1f} s ({idle / (busy + idle):.0%}) for images")
    print(f"speed, pass / in sequence: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
