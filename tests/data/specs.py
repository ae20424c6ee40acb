"""Data set descriptions and small pictures for the tests of this folder."""

import random
from pathlib import Path

import numpy as np
from PIL import Image

from library.config.dataset_file import DatasetSpec, SubsetSpec
from library.sizes import Size


def subset(folder="images", **changes) -> SubsetSpec:
    """A subset with sd-scripts' defaults, except for the caption extension .txt."""
    values = {
        "image_dir": str(folder),
        "num_repeats": 1,
        "class_tokens": None,
        "is_reg": False,
        "caption_extension": ".txt",
        "caption_separator": ",",
        "shuffle_caption": False,
        "keep_tokens": 0,
        "keep_tokens_separator": "",
        "caption_prefix": None,
        "caption_suffix": None,
        "caption_dropout_rate": 0.0,
        "caption_dropout_every_n_epochs": 0,
        "caption_tag_dropout_rate": 0.0,
        "flip_aug": False,
        "random_crop": False,
        "resize_interpolation": None,
        "custom_attributes": {},
    }
    return SubsetSpec(**(values | changes))


def dataset(*subsets: SubsetSpec, **changes) -> DatasetSpec:
    """A data set of small buckets: 64 x 64 pixels of area, sides of 32 to 128."""
    values = {
        "batch_size": 2,
        "resolution": Size(64, 64),
        "enable_bucket": True,
        "min_bucket_reso": 32,
        "max_bucket_reso": 128,
        "bucket_reso_steps": 32,
        "bucket_no_upscale": False,
    }
    return DatasetSpec(subsets=subsets, **(values | changes))


def picture(width: int, height: int, *, seed: int = 0) -> np.ndarray:
    """Random colours in blocks, uint8 (H, W, 3)."""
    rng = np.random.default_rng(random.Random(f"{width} {height} {seed}").getrandbits(32))
    blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return np.ascontiguousarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width])


def write_picture(path: Path, width: int, height: int, *, caption: str | None = None, seed: int = 0) -> Path:
    """A picture file, with its caption file beside it if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(width, height, seed=seed)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


SIZES = ((64, 64), (96, 40), (40, 96), (70, 64), (128, 100), (64, 64), (150, 60))


def write_folder(folder: Path, sizes=SIZES) -> Path:
    """One picture of each size, p0.png and so on, captioned "a, b0, c", "a, b1, c", ..."""
    for number, (width, height) in enumerate(sizes):
        write_picture(folder / f"p{number}.png", width, height, caption=f"a, b{number}, c", seed=number)
    return folder
