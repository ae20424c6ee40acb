"""Images that are held out of training, to measure the loss on pictures that the model has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from library.config.dataset_file import DatasetSpec, SubsetSpec
from library.data.records import ScanReport, Skipped
from library.data.table import ImageTable
from library.seeds import derive_seed


def hold_out(table: ImageTable, specs: Sequence[DatasetSpec], *, seed: int, report: ScanReport) -> None:
    """Mark the images of `is_validation` subsets, and of each data set the share that `validation_split` asks for.

    Files are held out, not uses of them: one that is used several times, also in other data sets, is on one side
    everywhere. Regularisation images are never held out; one whose file is held out as a training image is left out.
    Which files are taken depends on the seed (the data set's `validation_seed`, else `seed`) and their keys alone, not
    on their order, so that most stay on their side when others come or go. The share is rounded half up, and at least
    one file of a data set stays.

    What is held out is visited once per epoch, as it is: not mirrored, cropped in the centre (also where a
    face could be followed), captions neither
    shuffled nor dropped.
    """
    datasets, is_reg = table.image_datasets, table.is_reg
    is_own = np.array([subset.is_validation for subset in table.subsets], dtype=bool)[table.subset_of]
    is_used = table.is_live & (table.repeats > 0)
    held = [table.path_ids[is_used & is_own]]
    for index, spec in enumerate(specs):
        mine = np.flatnonzero(is_used & ~is_own & ~is_reg & (datasets == index))
        if spec.validation_split and len(mine):
            chosen = spec.validation_seed if spec.validation_seed is not None else seed
            held.append(_share(table, mine, share=spec.validation_split, seed=chosen))
    is_held = np.isin(table.path_ids, np.concatenate(held))
    for image in np.flatnonzero(is_held & is_used & is_reg).tolist():
        table.is_live[image] = False
        report.skipped.append(Skipped(table.paths.text(image), "the regularisation image is also held out"))
    table.set_validation(is_held & ~is_reg, as_it_is)


def _share(table: ImageTable, images: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """The path ids of the files among `images` that are held out, uint64."""
    paths = np.unique(table.path_ids[images])
    count = min(int(len(paths) * share + 0.5), len(paths) - 1)
    # A file's first use in the whole run names it, so that it ranks alike in every data set.
    _, first = np.unique(table.path_ids, return_index=True)
    ranked = sorted(
        (derive_seed(seed, "validation", table.keys.text(image)), image)
        for image in first[np.isin(table.path_ids[first], paths)].tolist()
    )
    return table.path_ids[[image for _, image in ranked[:count]]]


def as_it_is(subset: SubsetSpec) -> SubsetSpec:
    """The subset for held-out images: one visit, nothing drawn but wildcards, which a caption cannot do without."""
    return replace(
        subset,
        is_validation=True,
        num_repeats=1,
        flip_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0,
    )


def validation_specs(table: ImageTable, specs: Sequence[DatasetSpec]) -> list[DatasetSpec]:
    """The data sets of the held-out images, one for each of `specs`, with the subsets that the table has for them."""
    datasets = table.image_datasets
    held = np.flatnonzero(table.is_validation)
    subsets: list[list[SubsetSpec]] = [[] for _ in specs]
    for index, number in np.unique(np.stack([datasets[held], table.subset_of[held]]), axis=1).T.tolist():
        subsets[index].append(table.subsets[number])
    return [replace(spec, subsets=tuple(group)) for spec, group in zip(specs, subsets, strict=True)]
