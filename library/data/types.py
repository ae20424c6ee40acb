"""The records that travel through the data pipeline, from a file on disk to a batch on the device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from library.config.dataset_file import SubsetSpec
from library.data.buckets import Placement
from library.diffusion.conditioning import TextCond, Tokens
from library.errors import UserError
from library.sizes import Size

READ_ERRORS = (UserError, OSError, ValueError, KeyError)
"""What a damaged image or cache file can raise; it costs the sample, not the run."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image file and what its subset says about it.

    `key` names the image independently of where the data set lies ("<folder>/<file>", with "#2" and so on for a
    second use of the same name); every random draw of a sample is derived from it, so moving a data set does not
    change a training run. `size` is that of the file as it is shown (EXIF rotation applied), in pixels.
    """

    key: str
    path: str
    size: Size
    caption: str
    subset: SubsetSpec
    repeats: int = 1
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """A record together with its bucket; `dataset` is the index of its `[[datasets]]` entry."""

    record: ImageRecord
    placement: Placement
    dataset: int


class SampleKey(NamedTuple):
    """One visit of one image within an epoch; `repeat` counts from 0."""

    record: str
    repeat: int


class Skipped(NamedTuple):
    """An image that is left out of training, and why."""

    path: str
    reason: str

    @classmethod
    def because_of(cls, path: str, error: Exception) -> Skipped:
        """The reason in one line."""
        if isinstance(error, UserError):
            return cls(path, "; ".join(problem.what for problem in error.problems))
        return cls(path, f"{type(error).__name__}: {error}")


@dataclass
class ScanReport:
    """What a source found wrong while it listed images: the images left out, and those without a caption."""

    skipped: list[Skipped] = field(default_factory=list)
    missing_captions: list[str] = field(default_factory=list)


@dataclass
class Batch:
    """What one rank feeds to one forward pass: rows of one bucket.

    The first `num_real` rows are samples; rows after them are padding (copies of a real row) with weight 0, which
    give every rank the same number of rows. `sizes_B6` is float32: original h, w, crop top, left, target h, w, in
    pixels. `pixels_B3HW` is float32 in [-1, 1]; `latents_B4hw` is the unscaled output of the VAE. `failures` lists
    images that could not be read for this batch; their rows are among the padding.
    """

    keys: list[SampleKey]
    num_real: int
    weight_B: Tensor
    captions: list[str]
    sizes_B6: Tensor
    bucket: Size
    pixels_B3HW: Tensor | None = None
    latents_B4hw: Tensor | None = None
    tokens: Tokens | None = None
    text: TextCond | None = None
    mask_B1hw: Tensor | None = None
    control_B3HW: Tensor | None = None
    failures: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """A copy with every tensor on `device`; dtypes stay."""
        moved: dict[str, object] = {}
        for slot in dataclasses.fields(self):
            value = getattr(self, slot.name)
            if isinstance(value, Tensor):
                moved[slot.name] = value.to(device, non_blocking=non_blocking)
            elif isinstance(value, Tokens | TextCond):
                moved[slot.name] = value.to(device)
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; the data loader calls this when a GPU is present."""
        pinned: dict[str, object] = {}
        for slot in dataclasses.fields(self):
            value = getattr(self, slot.name)
            if isinstance(value, Tensor):
                pinned[slot.name] = value.pin_memory()
            elif isinstance(value, TextCond):
                pinned[slot.name] = TextCond(value.hidden_BTD.pin_memory(), value.pooled_BP.pin_memory())
        return dataclasses.replace(self, **pinned)


@dataclass
class StepGroup:
    """The micro-batches of one optimizer step on this rank.

    `samples` counts the planned samples of the whole group over all ranks: the divisor of the step's mean loss.
    """

    micro_batches: list[Batch]
    samples: int
