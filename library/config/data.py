"""Options about images, captions, buckets and caches."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from library.config.fields import ADMIN, LATENTS, REPORT, SHARED, TEXTS, TRAINER, Group, SizeValue, SpanValue, option

IMAGES = TRAINER | LATENTS | ADMIN | REPORT
CAPTIONS = TRAINER | TEXTS | ADMIN | REPORT


class DataOptions(Group):
    """Where the data is and what happens to it; most of these can also stand in the dataset file."""

    title: ClassVar[str] = "data"
    acts: ClassVar[frozenset[str]] = SHARED | ADMIN | REPORT

    dataset_config: str | None = option(None, "dataset file (.toml or .json)", path=True)
    train_data_dir: str | None = option(
        None, "folder of folders named like 10_cat: 10 repeats, class words `cat`", path=True
    )
    reg_data_dir: str | None = option(
        None, "folder of folders of regularisation images, named in the same way", path=True
    )
    in_json: str | None = option(
        None, "metadata file (.json or .jsonl) that names the images in train_data_dir and their captions", path=True
    )
    prior_loss_weight: float = option(1.0, "loss weight of regularisation images", ge=0, acts=TRAINER)
    resolution: SizeValue | None = option(None, "training resolution: one number, or width,height")
    resolutions: tuple[SizeValue, ...] = option(
        (),
        "several training resolutions in one run, instead of `resolution`: every visit of an image takes place at one "
        "of them, drawn anew each epoch",
    )
    resolution_weights: tuple[float, ...] = option(
        (), "how often each of `resolutions` is drawn, relative to the others (unset: all alike)", acts=IMAGES
    )
    enable_bucket: bool = option(
        False, "sort images into buckets by aspect ratio instead of cropping to one shape", acts=IMAGES
    )
    min_bucket_reso: int = option(256, "smallest bucket side in pixels", ge=1, acts=IMAGES)
    max_bucket_reso: int = option(1024, "largest bucket side in pixels", ge=1, acts=IMAGES)
    bucket_reso_steps: int = option(
        64, "bucket sides are multiples of this; itself a multiple of 32", ge=1, acts=IMAGES
    )
    bucket_no_upscale: bool = option(False, "make buckets from the image sizes and never enlarge an image", acts=IMAGES)
    bucket_selection: str = option(
        "sdscripts",
        "how a bucket is chosen: by sd-scripts' rule (nearest aspect ratio), or by `area` (the size that uses the most "
        "of the training area and crops the least)",
        choices=["sdscripts", "area"],
        acts=IMAGES,
    )
    bucket_max_crop: float | None = option(
        None,
        "largest share of an image's pixels that may be cropped, such as 0.1; an image that loses more is moved to a "
        "bucket where it does not, or reported when there is none",
        gt=0,
        lt=1,
        acts=IMAGES,
    )
    bucket_max_upscale: float | None = option(
        None,
        "largest factor by which the sides of an image may be enlarged, such as 1.5; an image that needs more is moved "
        "to a smaller bucket, or reported when there is none",
        ge=1,
        acts=IMAGES,
    )
    caption_extension: str = option(
        ".caption", "extension of caption files (the dot may be left out)", aliases=["caption_extention"]
    )
    caption_separator: str = option(",", "text that separates the parts of a caption", acts=CAPTIONS)
    shuffle_caption: bool = option(False, "put the parts of a caption in a new order each time", acts=CAPTIONS)
    keep_tokens: int = option(0, "number of leading parts that stay in place", ge=0, acts=CAPTIONS)
    keep_tokens_separator: str = option(
        "", "marks the fixed part of a caption: everything before its first occurrence stays", acts=CAPTIONS
    )
    secondary_separator: str | None = option(
        None, "text that becomes caption_separator in the end: it keeps parts together until then", acts=CAPTIONS
    )
    enable_wildcard: bool = option(
        False, "use any line of a caption file, and one alternative of every {a|b} in it", acts=CAPTIONS
    )
    caption_prefix: str | None = option(None, "text put before every caption", acts=CAPTIONS)
    caption_suffix: str | None = option(None, "text put after every caption", acts=CAPTIONS)
    caption_dropout_rate: float = option(
        0.0, "share of captions that are left empty", ge=0, le=1, acts=TRAINER | REPORT
    )
    caption_dropout_every_n_epochs: int = option(
        0, "leave all captions empty in every Nth epoch", ge=0, acts=TRAINER | REPORT
    )
    caption_tag_dropout_rate: float = option(
        0.0, "share of the movable caption parts that are left out", ge=0, le=1, acts=CAPTIONS
    )
    token_warmup_min: int = option(1, "movable caption parts used at the first step", ge=0, acts=CAPTIONS)
    token_warmup_step: int | float = option(
        0, "step from which all caption parts are used: a step, or a share of all steps (0.1 or 10%)", acts=CAPTIONS
    )
    flip_aug: bool = option(False, "mirror half of the images", acts=IMAGES)
    color_aug: bool = option(
        False, "change the hue or the brightness of a third of the images a little, anew each time", acts=IMAGES
    )
    random_crop: bool = option(False, "crop at a random place instead of the centre", acts=IMAGES)
    face_crop_aug_range: SpanValue | None = option(
        None,
        "crop around the face of images whose names end in its centre and size (`_cx_cy_w_h`), anew each time: the "
        "shorter side of the crop is LOW to HIGH times the face; acts without enable_bucket",
        acts=IMAGES,
    )
    resize_interpolation: str | None = option(
        None,
        "resampling for every resize (unset: area when shrinking, Lanczos otherwise)",
        choices=["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"],
        acts=IMAGES,
    )
    alpha_mask: bool = option(False, "weight the loss by each image's transparency: its alpha / 255", acts=IMAGES)
    masked_loss: bool = option(
        False,
        "the images in a subset's conditioning_data_dir are masks: weight the loss by red / 255",
        acts=IMAGES,
    )
    masked_loss_normalize: str = option(
        "none",
        "none: a small mask has a small loss; area: each sample's loss is divided by the mean of its mask",
        choices=["none", "area"],
        acts=TRAINER,
    )
    validation_split: float = option(
        0.0,
        "share of the images of each dataset that is not trained on (regularisation images apart)",
        ge=0,
        le=1,
        acts=TRAINER | REPORT,
    )
    validation_seed: int | None = option(
        None, "chooses the images of validation_split (unset: the seed of the run)", acts=TRAINER | REPORT
    )
    dataset_repeats: int = option(1, "repeats of subsets in the dataset file that name none", ge=1)
    train_batch_size: int = option(1, "images per step and process", ge=1, acts=TRAINER | REPORT)
    cache_latents: bool = option(False, "encode all images once before training", acts=TRAINER | LATENTS | REPORT)
    cache_latents_to_disk: bool = option(
        False, "keep the latents on disk (see cache_store and cache_dir)", acts=TRAINER | LATENTS | REPORT
    )
    cache_latents_moments: bool = option(
        False, "cache the VAE's mean and variance, so that every epoch draws fresh latents", acts=TRAINER | LATENTS
    )
    cache_in_background: bool = option(
        False,
        "start training at once and cache each image, at all its resolutions, when it is first used",
        acts=TRAINER,
    )
    cache_text_encoder_outputs: bool = option(
        False,
        "encode all captions once before training; the text encoders are then not trained",
        acts=TRAINER | TEXTS | REPORT,
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "keep the encoded captions on disk (see cache_store and cache_dir)", acts=TRAINER | TEXTS | REPORT
    )
    cache_store: str = option(
        "npz",
        "how a cache on disk is kept: one `npz` file per image, as sd-scripts has it, or `packed` in a few large files",
        choices=["npz", "packed"],
        acts=SHARED,
    )
    cache_dir: str | None = option(
        None,
        "folder for the caches on disk and the indexes of the image folders (unset: npz files and indexes next to the "
        "images; a packed cache in .sdxl_cache, in train_data_dir or next to the dataset_config or in_json file)",
        path=True,
    )
    text_cache_variants: int = option(
        1,
        "wordings of each caption to keep with cache_text_encoder_outputs, for captions that are shuffled, thinned out "
        "or have wildcards; each visit of an image takes one of them",
        ge=1,
        acts=TRAINER | TEXTS | REPORT,
    )
    text_encoder_batch_size: int = option(
        8, "captions that are encoded at once for a cache", ge=1, acts=TRAINER | TEXTS
    )
    skip_cache_check: bool = option(
        False,
        "do not check what existing cache files were made from, only that they hold what the run needs; latents alone, "
        "at one resolution, are not even opened",
        acts=SHARED,
    )
    legacy_crop_conditioning: bool = option(
        False,
        "use sd-scripts' crop numbers (margins of a contain fit) instead of the real crop",
        acts=TRAINER | LATENTS,
    )
    max_data_loader_n_workers: int = option(
        8, "processes that load images (never more than there are CPU cores; 0: none)", ge=0, acts=TRAINER
    )
    persistent_data_loader_workers: bool = option(
        False, "keep the loading processes alive between epochs", acts=TRAINER
    )
    debug_dataset: bool = option(
        False,
        "show what would be trained on (a table, and dataset_report.html in output_dir), then end without training",
        acts=TRAINER,
    )

    @field_validator("caption_extension")
    @classmethod
    def _with_dot(cls, value: str) -> str:
        if not value.strip("."):
            raise ValueError("must name an extension such as .txt")
        return value if value.startswith(".") else f".{value}"

    @field_validator("caption_separator")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value:
            raise ValueError("must not be empty")
        return value
