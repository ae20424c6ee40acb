"""Options about the model: which one, how it is loaded, how it encodes."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from library.config.choices import PREDICTION_TYPES
from library.config.fields import ADMIN, LATENTS, REPORT, SHARED, TEXTS, TRAINER, Group, option


class ModelOptions(Group):
    """The checkpoint and its parts."""

    title: ClassVar[str] = "model"
    acts: ClassVar[frozenset[str]] = SHARED | ADMIN

    pretrained_model_name_or_path: str | None = option(
        None,
        "base model: a single-file checkpoint, a diffusers folder, a hub id, or `tiny` for the embedded small model",
        path=True,
    )
    vae: str | None = option(
        None,
        "VAE to use instead of the checkpoint's own: file or diffusers folder",
        path=True,
        acts=TRAINER | LATENTS | ADMIN,
    )
    prediction_type: str | None = option(
        None,
        "what the model predicts (unset: what the checkpoint says, else epsilon)",
        choices=PREDICTION_TYPES,
        acts=TRAINER,
    )
    v_parameterization: bool = option(
        False, "the model predicts v, not noise: the same as prediction_type v_prediction", acts=TRAINER
    )
    allow_prediction_type_change: bool = option(
        False,
        "train a checkpoint to another prediction type than it says it has, which is an error otherwise",
        acts=TRAINER,
    )
    zero_terminal_snr: bool = option(
        False,
        "rescale the noise schedule so that its last step is pure noise (on where the checkpoint says so)",
        acts=TRAINER,
    )
    flow_shift: float | None = option(
        None,
        "shift of rectified flow's timesteps, more noise above 1 (unset: the checkpoint's own, else 1)",
        gt=0,
        acts=TRAINER,
    )
    max_token_length: int = option(
        75,
        "caption length in tokens; a multiple of 75, longer captions take several chunks",
        ge=75,
        acts=TRAINER | TEXTS | ADMIN | REPORT,
    )
    weighted_captions: bool = option(
        False,
        "honour weights such as (a red cat:1.2) and [dog] in captions",
        acts=TRAINER | TEXTS | ADMIN | REPORT,
    )
    clip_skip: int | None = option(
        None,
        "only recorded in the metadata: SDXL always uses the penultimate layer",
        ge=1,
        zero_is_unset=True,
        acts=TRAINER,
    )
    no_half_vae: bool = option(False, "run the VAE in float32", acts=TRAINER | LATENTS)
    vae_batch_size: int = option(1, "images that the VAE encodes at once", ge=1, acts=TRAINER | LATENTS)
    vae_slicing: bool = option(False, "let the VAE work on one image at a time to save memory", acts=TRAINER | LATENTS)
    vae_tiling: bool = option(
        False, "let the VAE work on overlapping tiles to save memory on large images", acts=TRAINER | LATENTS
    )
    disable_mmap_load_safetensors: bool = option(
        False, "read safetensors files as a whole instead of mapping them: faster on network drives"
    )
    sdpa: bool = option(False, "PyTorch's scaled-dot-product attention, which is also the default", acts=TRAINER)
    xformers: bool = option(False, "attention of the xformers library; needs CUDA", acts=TRAINER)
    mem_eff_attn: bool = option(False, "memory-efficient attention; sdpa has taken its place and is used", acts=TRAINER)

    @field_validator("max_token_length")
    @classmethod
    def _whole_chunks(cls, value: int) -> int:
        if value % 75:
            raise ValueError(f"must be a multiple of 75, such as {(value // 75 + 1) * 75}")
        return value
