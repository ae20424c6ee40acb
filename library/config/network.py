"""Options about the trained network (LoRA and its relatives)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from library.config.fields import NETWORK, Group, option
from library.config.key_values import split_pairs


class NetworkOptions(Group):
    """Which adapter is trained, on what, and how large it is."""

    title: ClassVar[str] = "network"
    acts: ClassVar[frozenset[str]] = NETWORK

    network_module: str | None = option(None, "kind of network: networks.lora, or the module path of your own")
    network_dim: int | None = option(None, "rank of the network (unset: 4)", ge=1)
    network_alpha: float = option(1.0, "the network acts with strength alpha / dim (0: as dim)", ge=0)
    network_dropout: float | None = option(None, "dropout on the low-rank activations", ge=0, lt=1)
    network_args: tuple[str, ...] = option(
        (), "key=value arguments of the network module, such as conv_dim=4 conv_alpha=1"
    )
    network_weights: str | None = option(None, "network file to start from", path=True)
    dim_from_weights: bool = option(False, "take the ranks from network_weights")
    scale_weight_norms: float | None = option(
        None,
        "after each step, shrink every module's addition to this norm at most (1.0 is usual)",
        ge=0,
        zero_is_unset=True,
    )
    base_weights: tuple[str, ...] = option((), "network files merged into the model before training", path=True)
    base_weights_multiplier: tuple[float, ...] = option((), "strengths of base_weights (unset: 1.0 each)")
    network_train_unet_only: bool = option(False, "train no text encoder")
    network_train_text_encoder_only: bool = option(False, "train no U-Net")
    unet_lr: float | None = option(None, "learning rate of the U-Net's part (unset: learning_rate)", ge=0)
    text_encoder_lr: tuple[float, ...] = option(
        (), "learning rate of the text encoders: one for both, or one each (unset: learning_rate)"
    )
    training_comment: str | None = option(None, "free text for the file's metadata")
    no_metadata: bool = option(False, "leave all metadata out of the file but what is needed to load it")

    @field_validator("text_encoder_lr")
    @classmethod
    def _one_or_two(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) > 2:
            raise ValueError(f"has {len(value)} values; SDXL has two text encoders")
        if any(rate < 0 for rate in value):
            raise ValueError("must not be negative")
        return value

    @field_validator("network_args")
    @classmethod
    def _readable_pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        split_pairs(value)
        return value

    def network_kwargs(self) -> dict[str, str]:
        """network_args as a dict of texts; the network module gives them types."""
        return split_pairs(self.network_args)
