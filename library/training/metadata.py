"""The ss_* metadata of a trained network (model_files.md section 9): pure, from settings to strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.io.modelspec import ss_value

# Kept under --no_metadata: what a loader needs, nothing about the run.
MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
# Settings that are written under their own name.
SAME_NAME = (
    "output_name",
    "learning_rate",
    "unet_lr",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "max_train_steps",
    "lr_warmup_steps",
    "lr_scheduler",
    "network_module",
    "network_dim",
    "network_alpha",
    "network_dropout",
    "scale_weight_norms",
    "mixed_precision",
    "full_fp16",
    "fp8_base",
    "fp8_base_unet",
    "clip_skip",
    "max_token_length",
    "cache_latents",
    "max_grad_norm",
    "training_comment",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "loss_type",
    "huber_schedule",
    "huber_scale",
    "huber_c",
    "min_snr_gamma",
    "noise_offset",
    "noise_offset_random_strength",
    "adaptive_noise_scale",
    "multires_noise_iterations",
    "multires_noise_discount",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
    "resize_interpolation",
    "prior_loss_weight",
    "validation_seed",
    "validation_split",
    "zero_terminal_snr",
    "max_validation_steps",
    "validate_every_n_epochs",
    "validate_every_n_steps",
)


# What sd-scripts records of abilities that this run did not use; readers of metadata look for these keys.
NOT_USED = {
    f"ss_{name}": value
    for name, value in {
        "lowram": False,
    }.items()
}


@dataclass(frozen=True)
class RunDescription:
    """Facts of a run that its settings do not hold. Times are seconds since the epoch."""

    session_id: str
    started_at: float
    seed: int
    optimizer: str
    num_train_images: int
    num_reg_images: int
    num_validation_images: int
    num_batches_per_epoch: int
    num_epochs: int
    max_train_steps: int


def optimizer_text(optimizer: Any, arguments: Mapping[str, Any]) -> str:
    """`module.Class(k=v,...)`, as sd-scripts records it."""
    cls = type(optimizer)
    inside = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{cls.__module__}.{cls.__qualname__}" + (f"({inside})" if inside else "")


def network_metadata(
    flat: Mapping[str, Any], run: RunDescription, dataset: Mapping[str, str], network: Mapping[str, str]
) -> dict[str, str]:
    """Everything that is known before training, as strings.

    flat: the settings by flag name. dataset: the ss_* part that describes the images. network: what the network itself
    says (dim, alpha, arguments), which wins over the settings because a loaded file may have decided it.
    """
    values: dict[str, Any] = dict(NOT_USED)
    values |= {f"ss_{name}": flat[name] for name in SAME_NAME if name in flat}
    text_lr = flat.get("text_encoder_lr")
    if values.get("ss_max_token_length") == 75:
        values["ss_max_token_length"] = None  # how sd-scripts writes the default
    span = flat.get("face_crop_aug_range")
    values |= {
        "ss_face_crop_aug_range": None if span is None else tuple(span),
        "ss_text_encoder_lr": (text_lr[0] if len(text_lr) == 1 else list(text_lr)) if text_lr else None,
        "ss_debiased_estimation": flat["debiased_estimation_loss"],
        "ss_session_id": run.session_id,
        "ss_training_started_at": run.started_at,
        "ss_seed": run.seed,
        "ss_optimizer": run.optimizer,
        "ss_num_train_images": run.num_train_images,
        "ss_num_reg_images": run.num_reg_images,
        "ss_num_validation_images": run.num_validation_images,
        "ss_num_batches_per_epoch": run.num_batches_per_epoch,
        "ss_num_epochs": run.num_epochs,
        "ss_max_train_steps": run.max_train_steps,
        "ss_v2": False,
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    strings = {key: ss_value(value) for key, value in values.items()}
    return strings | dict(dataset) | dict(network)


def at_save(
    metadata: Mapping[str, str], *, finished_at: float, steps: int, epoch: int, minimum: bool
) -> dict[str, str]:
    """`metadata` completed for one file; `minimum` keeps only MINIMUM (`--no_metadata`)."""
    if minimum:
        return {key: value for key, value in metadata.items() if key in MINIMUM}
    moment = {"ss_training_finished_at": finished_at, "ss_steps": steps, "ss_epoch": epoch}
    return dict(metadata) | {key: ss_value(value) for key, value in moment.items()}
