"""What a dataset is, once every value has been looked up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.config.spans import Span
from library.sizes import Size


@dataclass(frozen=True)
class SubsetSpec:
    """One folder of images, or one metadata file, and how its images and captions are treated.

    `image_dir` is "" for a metadata file without one: its keys are then absolute paths. `loss_weight` is
    `prior_loss_weight` for regularisation images (`is_reg`) and 1 for all others. `mask_dir` holds loss masks,
    `control_dir` condition images, found by the stems of the images; with `alpha_mask` an image's alpha is its mask.
    The images of an `is_validation` subset are not trained on. `templates` are sentences of which every visit takes
    one in place of its caption. `face_crop_aug_range` is None where buckets are on.
    """

    image_dir: str
    metadata_file: str | None = None
    num_repeats: int = 1
    class_tokens: str | None = None
    is_reg: bool = False
    is_validation: bool = False
    loss_weight: float = 1.0
    caption_extension: str = ".caption"
    caption_separator: str = ","
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: int | float = 0
    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: Span | None = None
    resize_interpolation: str | None = None
    alpha_mask: bool = False
    mask_dir: str | None = None
    control_dir: str | None = None
    templates: tuple[str, ...] = ()
    custom_attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def source(self) -> str:
        """The plugin of library/data/sources that lists the images."""
        return "metadata_json" if self.metadata_file else "folders"

    @property
    def has_many_looks(self) -> bool:
        """Whether an image differs from visit to visit by more than its mirroring, so that no cache can hold it."""
        return self.random_crop or self.color_aug or self.face_crop_aug_range is not None

    @property
    def has_masks(self) -> bool:
        """Whether the loss of its images is weighted by masks."""
        return self.alpha_mask or self.mask_dir is not None

    @property
    def place(self) -> str:
        """The file or folder that the user named for it."""
        return self.metadata_file or self.image_dir


@dataclass(frozen=True)
class DatasetSpec:
    """Subsets that share batch size, resolutions and buckets. Bucket limits are multiples of the steps already.

    Most data sets have one resolution. Of one with several every visit of an image takes place at one of
    `resolutions`, drawn with `resolution_weights` (one for each, above 0; empty: all alike).
    """

    batch_size: int
    resolution: Size
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    subsets: tuple[SubsetSpec, ...]
    bucket_selection: str = "sdscripts"
    bucket_max_crop: float | None = None
    bucket_max_upscale: float | None = None
    validation_split: float = 0.0
    validation_seed: int | None = None
    other_resolutions: tuple[Size, ...] = ()
    resolution_weights: tuple[float, ...] = ()

    @property
    def resolutions(self) -> tuple[Size, ...]:
        """All resolutions, the first one first."""
        return (self.resolution, *self.other_resolutions)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each of `resolutions`."""
        return self.resolution_weights or (1.0,) * len(self.resolutions)
