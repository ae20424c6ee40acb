"""Options about the validation loss and about averaged weights."""

from __future__ import annotations

from typing import ClassVar

from library.config.fields import Group, option


class ValidationOptions(Group):
    """The loss on images that are not trained on."""

    title: ClassVar[str] = "validation loss"

    validate_every_n_steps: int | None = option(
        None, "measure the validation loss after every Nth step (0: not by steps)", ge=1, zero_is_unset=True
    )
    validate_every_n_epochs: int | None = option(
        None, "measure it after every Nth epoch (unset or 0: after each)", ge=1, zero_is_unset=True
    )
    validate_at_first: bool = option(False, "also measure it before the first step")
    max_validation_steps: int | None = option(
        None, "measure it on at most N batches of held-out and N of training images", ge=1, zero_is_unset=True
    )
    validation_timesteps: int = option(
        5,
        "timesteps at which each image is measured: the middles of as many equal bands from min_timestep to "
        "max_timestep",
        ge=1,
        le=1000,
    )
    validate_with_ema: bool = option(False, "measure the averaged weights (use_ema) instead of the current ones")


class EmaOptions(Group):
    """A moving average of the trained weights."""

    title: ClassVar[str] = "averaged weights (EMA)"

    use_ema: bool = option(False, "keep an exponential moving average of the trained weights, in float32")
    ema_decay: float = option(
        0.9999, "share of the average that one step keeps, in the long run; per step at any ema_update_interval",
        ge=0, le=1,
    )  # fmt: skip
    ema_min_decay: float = option(0.0, "the least share, also at the beginning", ge=0, le=1)
    ema_warmup: bool = option(
        False, "let the decay grow as 1 - (1 + n / ema_inv_gamma) ** -ema_power instead of (1 + n) / (10 + n) after n "
        "steps",
    )  # fmt: skip
    ema_inv_gamma: float = option(1.0, "see ema_warmup", gt=0)
    ema_power: float = option(
        2 / 3, "see ema_warmup; 2/3 for runs of a million steps, 3/4 and more for shorter ones", gt=0
    )
    ema_update_after_step: int = option(0, "steps after which averaging begins; until then it is the weights", ge=0)
    ema_update_interval: int = option(1, "steps between two updates of the average", ge=1)
    ema_device: str = option(
        "same", "where the average lies: `same` as the weights, or `cpu` to save GPU memory", choices=["same", "cpu"]
    )
    save_ema: str = option(
        "also",
        "`also`: beside every model file one of the average, named -ema; `last`: the final file alone is the average; "
        "`only`: every file is; `none`: the average is only used while training and kept in state folders",
        choices=["also", "last", "only", "none"],
    )
