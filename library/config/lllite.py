"""Options about ControlNet-LLLite: the condition images, and the network that learns to follow them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from library.config.fields import ADMIN, LATENTS, LLLITE, REPORT, TEXTS, Group, option


class ConditionOptions(Group):
    """What belongs to this trainer alone; the tools accept it in a shared TOML file."""

    title: ClassVar[str] = "ControlNet-LLLite"
    acts: ClassVar[frozenset[str]] = LLLITE

    conditioning_data_dir: str | None = option(
        None,
        "folder of condition images, one for each image, found by its name; the images then lie in train_data_dir "
        "itself (or in_json names them). A dataset_config names it in each subset instead",
        path=True,
        acts=LLLITE | LATENTS | TEXTS | ADMIN | REPORT,
    )
    cond_emb_dim: int = option(32, "width of the condition's embedding; an even number", ge=2)

    @field_validator("cond_emb_dim")
    @classmethod
    def _can_be_halved(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"must be even, such as {value + 1}: the first convolution has half as many outputs")
        return value


class LlliteOptions(ConditionOptions):
    """The network that is trained."""

    network_dim: int = option(64, "width of the modules' hidden layers", ge=1)
    network_weights: str | None = option(
        None, "ControlNet-LLLite to start from; it decides cond_emb_dim and network_dim", path=True
    )
    network_dropout: float | None = option(None, "dropout before the modules' last layer", ge=0, lt=1)
