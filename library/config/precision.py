"""Options about the precision of weights, and about the memory that an update takes."""

from __future__ import annotations

from typing import ClassVar

from library.config.fields import NETWORK, Group, option


class PrecisionOptions(Group):
    """In which precision weights are kept, and when they are updated."""

    title: ClassVar[str] = "precision and memory"

    full_bf16: bool = option(False, "trained weights and gradients in bfloat16; needs mixed_precision bf16")
    full_fp16: bool = option(False, "trained weights and gradients in float16; needs mixed_precision fp16")
    stochastic_rounding: bool = option(
        True, "with full_bf16: round updated weights up or down by chance, so that small updates are not lost"
    )
    fused_backward_pass: bool = option(
        False, "update each tensor inside the backward pass and free its gradient at once; without gradient clipping"
    )
    fused_optimizer_groups: int | None = option(
        None,
        "update in this many groups of tensors inside the backward pass; without gradient clipping",
        ge=1,
        zero_is_unset=True,
    )


class FrozenOptions(Group):
    """How the frozen base of a network is kept."""

    title: ClassVar[str] = "frozen base"
    acts: ClassVar[frozenset[str]] = NETWORK

    fp8_base: bool = option(
        False, "keep the frozen weights of the U-Net and of the text encoders in 8 bits; needs mixed_precision"
    )
    fp8_base_unet: bool = option(False, "keep the frozen weights of the U-Net in 8 bits; needs mixed_precision")
