"""Rules of a whole dataset: buckets that fit its resolution, caches that fit its augmentations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from library.config.dataset_spec import DatasetSpec
from library.config.fields import LLLITE, TRAINER
from library.config.run_config import RunConfig
from library.errors import Problem

# The latents of SDXL are halved twice inside the U-Net: 8 * 4 pixels.
BUCKET_STEP_UNIT = 32

NO_CONTROL_RUNS = TRAINER - LLLITE
"""Runs that have no use for condition images."""

# What gives a caption another wording on each visit that can be made ahead of training.
REWORDING = ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard")


# What makes an image look different on each visit, and what a cache of latents keeps instead.
_LOOKS = (("random_crop", "one crop"), ("face_crop_aug_range", "one crop"), ("color_aug", "the colours"))


def leave_faces_to_buckets(spec: DatasetSpec, *, where: str) -> tuple[DatasetSpec, list[str]]:
    """With buckets no crop follows a face: take the range from the subsets that have one, and say so."""
    places = _where_set(spec, "face_crop_aug_range") if spec.enable_bucket else ""
    if not places:
        return spec, []
    subsets = tuple(dataclasses.replace(subset, face_crop_aug_range=None) for subset in spec.subsets)
    told = f"face_crop_aug_range has no effect in {places}: it acts without enable_bucket ({where})"
    return dataclasses.replace(spec, subsets=subsets), [told]


def align_buckets(spec: DatasetSpec, *, where: str) -> tuple[DatasetSpec, list[str]]:
    """Round the smallest bucket side down and the largest up to multiples of the steps, and say so."""
    if not spec.enable_bucket:
        return spec, []
    step = spec.bucket_reso_steps
    low = spec.min_bucket_reso // step * step
    high = -(-spec.max_bucket_reso // step) * step
    notices = [
        f"{name} is {new} instead of {old}, a multiple of bucket_reso_steps {step} ({where})"
        for name, old, new in (
            ("min_bucket_reso", spec.min_bucket_reso, low),
            ("max_bucket_reso", spec.max_bucket_reso, high),
        )
        if old != new
    ]
    return dataclasses.replace(spec, min_bucket_reso=low, max_bucket_reso=high), notices


def check_dataset(cfg: RunConfig, spec: DatasetSpec, *, where: str) -> list[Problem]:
    """The problems of a dataset as a whole."""
    problems = [*_kinds(spec, where), *_controls(cfg, spec, where), *_buckets(spec, where)]
    return [*problems, *_latent_cache(cfg, spec), *_text_cache(cfg, spec)]


def check_all(cfg: RunConfig, specs: Sequence[DatasetSpec]) -> list[Problem]:
    """The problems of all datasets together: options about masks need masks, and something is to be trained on."""
    if specs and all(subset.is_validation for spec in specs for subset in spec.subsets):
        fix = "leave is_validation out of the subsets that are trained on"
        return [Problem("every subset is held out by is_validation", cfg.provenance["dataset_config"], fix)]
    has_masks = any(subset.has_masks for spec in specs for subset in spec.subsets)
    if not specs or has_masks:
        return []
    problems = []
    fix = "set alpha_mask, or masked_loss and in a dataset_config the conditioning_data_dir with the masks"
    for name, is_on in (("masked_loss", cfg.data.masked_loss), ("masked_loss_normalize", _normalizes(cfg))):
        if is_on:
            problems.append(Problem(f"{name} has no mask to act with", f"{name}: {cfg.provenance[name]}", fix))
    return problems


def _normalizes(cfg: RunConfig) -> bool:
    return cfg.data.masked_loss_normalize != "none"


def _controls(cfg: RunConfig, spec: DatasetSpec, where: str) -> list[Problem]:
    """Condition images: for runs that use them, and then for every image of a batch."""
    places = [subset.place for subset in spec.subsets if subset.control_dir]
    if cfg.run in LLLITE and len(places) < len(spec.subsets):
        without = ", ".join(subset.place for subset in spec.subsets if not subset.control_dir)
        fix = "name their folder in conditioning_data_dir, of the run or of the subset"
        return [Problem(f"{without} has no condition images, and this run learns from nothing else", where, fix)]
    if not places:
        return []
    if cfg.run in NO_CONTROL_RUNS:
        what = f"this run uses no condition images, so conditioning_data_dir cannot act in {', '.join(places)}"
        return [Problem(what, where, "if it holds masks, set masked_loss; else remove it")]
    if len(places) < len(spec.subsets):
        fix = "put the subsets with conditioning_data_dir into a [[datasets]] of their own"
        return [Problem("a dataset has subsets with condition images and subsets without", where, fix)]
    return []


def _kinds(spec: DatasetSpec, where: str) -> list[Problem]:
    """Regularisation images are repeated as often as there are training images beside them; no images are both
    trained on and held out."""
    problems = []
    reg, held, trained = (
        [subset.place for subset in spec.subsets if wanted(subset)]
        for wanted in (
            lambda subset: subset.is_reg,
            lambda subset: subset.is_validation,
            lambda subset: not subset.is_reg and not subset.is_validation,
        )
    )
    if reg and not trained:
        fix = "put a subset without is_reg into the same dataset"
        problems.append(Problem("the dataset has regularisation images and no training images", where, fix))
    for place in held:
        if place in reg or place in trained:
            what = f"{place} is trained on and held out by is_validation"
            problems.append(Problem(what, where, "keep one; validation_split holds a part of the images out"))
    return problems


def _buckets(spec: DatasetSpec, where: str) -> list[Problem]:
    if not spec.enable_bucket:
        return [
            Problem(f"{name} cannot act without enable_bucket", where, f"set enable_bucket, or leave out {name}")
            for name, off in (
                ("bucket_selection", "sdscripts"),
                ("bucket_max_crop", None),
                ("bucket_max_upscale", None),
            )
            if getattr(spec, name) != off
        ]
    problems = []
    if spec.bucket_no_upscale and spec.bucket_max_upscale is not None:
        what = "bucket_max_upscale cannot act with bucket_no_upscale, which never enlarges an image"
        problems.append(Problem(what, where, "leave out one of them"))
    if spec.bucket_reso_steps % BUCKET_STEP_UNIT:
        what = f"bucket_reso_steps {spec.bucket_reso_steps} is not a multiple of {BUCKET_STEP_UNIT}"
        problems.append(Problem(what, where, "SDXL needs picture sides that are multiples of 32; 64 is usual"))
    for resolution in spec.resolutions:
        low, high = min(resolution), max(resolution)
        if low < spec.min_bucket_reso:
            what = f"resolution {resolution} has a side below min_bucket_reso {spec.min_bucket_reso}"
            problems.append(Problem(what, where, f"set min_bucket_reso to {low} or less"))
        if high > spec.max_bucket_reso:
            what = f"resolution {resolution} has a side above max_bucket_reso {spec.max_bucket_reso}"
            problems.append(Problem(what, where, f"set max_bucket_reso to {high} or more"))
    return problems


def _latent_cache(cfg: RunConfig, spec: DatasetSpec) -> list[Problem]:
    if not cfg.data.cache_latents:
        return []
    where = f"cache_latents: {cfg.provenance['cache_latents']}"
    problems = []
    for name, kept in _LOOKS:
        places = [subset.place for subset in spec.subsets if getattr(subset, name)]
        if places:
            what = f"cache_latents keeps {kept} of each image, so {name} cannot act in {', '.join(places)}"
            problems.append(Problem(what, where, f"leave out cache_latents or {name}"))
    return problems


def _text_cache(cfg: RunConfig, spec: DatasetSpec) -> list[Problem]:
    """Caption dropout is fine, the empty caption is cached too; every other wording needs an encoding of its own."""
    if not cfg.data.cache_text_encoder_outputs:
        return []
    problems = []
    where = f"cache_text_encoder_outputs: {cfg.provenance['cache_text_encoder_outputs']}"
    for name in () if cfg.data.text_cache_variants > 1 else REWORDING:
        if folders := _where_set(spec, name):
            what = f"cache_text_encoder_outputs keeps one wording of a caption, so {name} cannot act in {folders}"
            fix = f"set text_cache_variants, for example to 8, to keep several; or leave out {name} or the cache"
            problems.append(Problem(what, where, fix))
    if folders := _where_set(spec, "token_warmup_step"):
        what = f"cache_text_encoder_outputs keeps whole captions, so token_warmup_step cannot act in {folders}"
        problems.append(Problem(what, where, "leave out cache_text_encoder_outputs or token_warmup_step"))
    return problems


def idle_variants(cfg: RunConfig, specs: Sequence[DatasetSpec]) -> list[str]:
    """A notice when several wordings are asked for and every caption has one."""
    asked = cfg.data.cache_text_encoder_outputs and cfg.data.text_cache_variants > 1
    if not asked or not specs or any(_where_set(spec, name) for spec in specs for name in REWORDING):
        return []
    return [f"text_cache_variants has no effect: no subset sets {', '.join(REWORDING[:-1])} or {REWORDING[-1]}"]


def _where_set(spec: DatasetSpec, name: str) -> str:
    return ", ".join(subset.place for subset in spec.subsets if getattr(subset, name))
