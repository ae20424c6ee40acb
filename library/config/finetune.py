"""Options about the full fine-tune: which parts of the model train, and how fast each."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from library.config.fields import FULL, Group, option

NUM_UNET_BLOCKS = 23


class FinetuneOptions(Group):
    """Which weights of the model itself are trained."""

    title: ClassVar[str] = "full fine-tune"
    acts: ClassVar[frozenset[str]] = FULL

    train_text_encoder: bool = option(False, "also train the text encoders; the U-Net trains unless learning_rate is 0")
    learning_rate_te1: float | None = option(
        None, "learning rate of text encoder 1, CLIP-L (unset: learning_rate; 0: frozen)", ge=0
    )
    learning_rate_te2: float | None = option(
        None, "learning rate of text encoder 2, OpenCLIP bigG (unset: learning_rate; 0: frozen)", ge=0
    )
    block_lr: tuple[float, ...] = option(
        (),
        "23 learning rates of the U-Net's blocks, separated by commas: time and label embeddings, input_blocks 0-8, "
        "middle_block 0-2, output_blocks 0-8, out; 0 freezes the block",
    )
    unet_config: str | None = option(
        None,
        "config.json of a diffusers UNet2DConditionModel: train a new U-Net of this shape from scratch; the text "
        "encoders and the VAE come from pretrained_model_name_or_path",
        path=True,
    )

    @field_validator("block_lr", mode="before")
    @classmethod
    def _separated_by_commas(cls, value: object) -> object:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not any(isinstance(item, str) for item in items):
            return value
        numbers = [text.strip() for item in items for text in str(item).split(",") if text.strip()]
        try:
            return tuple(float(number) for number in numbers)
        except ValueError:
            raise ValueError("must be 23 numbers separated by commas") from None

    @field_validator("block_lr")
    @classmethod
    def _one_per_block(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value and len(value) != NUM_UNET_BLOCKS:
            raise ValueError(f"has {len(value)} values; the U-Net has {NUM_UNET_BLOCKS} blocks, one value for each")
        if any(rate < 0 for rate in value):
            raise ValueError("must not be negative")
        return value
