"""Options about the optimizer and the learning rate."""

from __future__ import annotations

import difflib
from typing import ClassVar

from pydantic import field_validator

from library.config.choices import (
    LR_SCHEDULERS,
    LR_SCHEDULERS_LATER,
    OPTIMIZERS,
    OPTIMIZERS_LATER,
    TORCH_OPTIMIZERS,
)
from library.config.fields import Group, option
from library.config.key_values import literal_pairs


class OptimOptions(Group):
    """How weights move."""

    title: ClassVar[str] = "optimizer"

    optimizer_type: str = option(
        "AdamW", "AdamW, AdamW8bit, Adafactor (in any case), or the dotted path of a class such as torch.optim.SGD"
    )
    optimizer_args: tuple[str, ...] = option(
        (), "key=value arguments of the optimizer, values as Python literals, such as weight_decay=0.01 betas=0.9,0.99"
    )
    use_8bit_adam: bool = option(False, "older spelling of optimizer_type AdamW8bit")
    learning_rate: float = option(2e-6, "learning rate", ge=0)
    lr_scheduler: str = option(
        "constant", "how the learning rate changes", choices=LR_SCHEDULERS, later=LR_SCHEDULERS_LATER
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (), 'key=value arguments of the scheduler, such as step_rules="1:10,0.1:20,0.01" for piecewise_constant'
    )
    lr_scheduler_num_cycles: int = option(1, "restarts of cosine_with_restarts", ge=1)
    lr_scheduler_power: float = option(1.0, "power of polynomial", gt=0)
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "floor of the learning rate; its scheduler, cosine_with_min_lr, is not there yet", ge=0, le=1
    )
    lr_warmup_steps: int | float = option(0, "warm-up: steps, or a share of all steps (0.1 or 10%)")
    lr_decay_steps: int | float = option(0, "length of the decay; its scheduler, warmup_stable_decay, is not there yet")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 switches clipping off", ge=0)

    @field_validator("optimizer_type")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        return optimizer_name(value)

    @field_validator("optimizer_args", "lr_scheduler_args")
    @classmethod
    def _readable_pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        literal_pairs(value)
        return value

    def optimizer_kwargs(self) -> dict[str, object]:
        """optimizer_args as keyword arguments."""
        return literal_pairs(self.optimizer_args)

    def scheduler_kwargs(self) -> dict[str, object]:
        """lr_scheduler_args as keyword arguments."""
        return literal_pairs(self.lr_scheduler_args)


def optimizer_name(value: str) -> str:
    """The canonical name of an optimizer, or a dotted class path. Raises ValueError for a name that has neither."""
    if not value:
        return OPTIMIZERS[0]
    for name in OPTIMIZERS:
        if value.lower() == name.lower():
            return name
    if value in TORCH_OPTIMIZERS:
        return f"torch.optim.{value}"
    if "." in value:
        if not all(part.isidentifier() for part in value.split(".")):
            raise ValueError("is neither an optimizer nor the dotted path of a class")
        return value
    available = f"available: {', '.join(OPTIMIZERS)}, or the dotted path of a class such as torch.optim.SGD"
    if value.lower() in {name.lower() for name in OPTIMIZERS_LATER}:
        raise ValueError(f"is not supported yet; {available}")
    near = difflib.get_close_matches(value, (*OPTIMIZERS, *TORCH_OPTIMIZERS), n=1)
    raise ValueError(f"is not an optimizer; {f'did you mean {near[0]}? ' if near else ''}{available}")
