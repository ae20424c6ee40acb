"""The records that travel through the data pipeline, from a file on disk to a batch on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    change a training run. `size` is that of the file as it is shown (EXIF rotation applied), in pixels. `tags` is the
    tag part of `caption` for a source that keeps the two apart, else None.
    """

    key: str
    path: str
    size: Size
    caption: str
    subset: SubsetSpec
    repeats: int = 1
    weight: float = 1.0
    tags: str | None = None


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
    """What became of the images that were listed: left out, without a caption, or not needed.

    `unused_reg` holds the regularisation images that no training image is left for.
    """

    skipped: list[Skipped] = field(default_factory=list)
    missing_captions: list[str] = field(default_factory=list)
    unused_reg: list[PlacedImage] = field(default_factory=list)


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
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; the data loader calls this when a GPU is present."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with every tensor changed, those inside tokens and text included."""
        changed: dict[str, Any] = {}
        for slot in dataclasses.fields(self):
            value = getattr(self, slot.name)
            if isinstance(value, Tensor):
                changed[slot.name] = change(value)
            elif isinstance(value, Tokens | TextCond):
                parts = [getattr(value, part.name) for part in dataclasses.fields(value)]
                changed[slot.name] = type(value)(*[None if part is None else change(part) for part in parts])
        return dataclasses.replace(self, **changed)


@dataclass
class StepGroup:
    """The micro-batches of one optimizer step on this rank.

    `samples` counts the planned samples of the whole group over all ranks: the divisor of the step's mean loss.
    """

    micro_batches: list[Batch]
    samples: int
