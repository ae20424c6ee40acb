"""A part of the training images to compare the held-out ones with: seen in training, but measured as these are."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from library.data.dataset import TrainData
from library.data.records import ScanReport
from library.data.table import ImageTable
from library.data.validation import as_it_is
from library.seeds import derive_seed


def training_subset(data: TrainData, count: int, *, seed: int) -> TrainData:
    """`count` of the training images, or all if there are fewer, each once per epoch, served as held-out images are.

    Which ones depends on the seed and their keys alone. Regularisation images are not among them. It has no caches of
    its own: see `share_caches`.
    """
    table = data.table
    own = table.images[~table.is_reg[table.images]]
    ranked = sorted((derive_seed(seed, "training subset", table.keys.text(image)), image) for image in own.tolist())
    chosen = np.array(sorted(image for _, image in ranked[:count]), dtype=np.int64)
    settings = replace(data.settings, seed=seed, accumulation=1, count_tokens=None)
    return TrainData(data.specs, only(table, chosen), scan_report=ScanReport(), settings=settings)


def only(table: ImageTable, images: np.ndarray) -> ImageTable:
    """The table with `images` (int64) alone in use, once each and as they are; rows and numbers stay the same."""
    part = copy.copy(table)
    part.is_validation = np.zeros_like(table.is_validation)
    part.repeats = np.zeros_like(table.repeats)
    part.repeats[images] = 1
    part.subset_of, part.subsets = table.subset_of.copy(), list(table.subsets)
    for number in np.unique(table.subset_of[images]).tolist():
        part.subset_of[images[table.subset_of[images] == number]] = len(part.subsets)
        part.subsets.append(replace(as_it_is(table.subsets[number]), is_validation=False))
    return part
