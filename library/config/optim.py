"""Options about the optimizer and the learning rate."""

from __future__ import annotations

import difflib
from typing import ClassVar

from pydantic import field_validator

from library.config.choices import (
    LR_SCHEDULERS,
    OPTIMIZERS,
    TORCH_OPTIMIZERS,
    TORCH_SCHEDULERS,
)
from library.config.fields import Group, option
from library.config.key_values import literal_pairs


class OptimOptions(Group):
    """How weights move."""

    title: ClassVar[str] = "optimizer"

    optimizer_type: str = option(
        "AdamW",
        f"{', '.join(OPTIMIZERS)} (in any case), a class of torch.optim such as SGD, or the dotted path of a class",
    )
    optimizer_args: tuple[str, ...] = option(
        (), "key=value arguments of the optimizer, values as Python literals, such as weight_decay=0.01 betas=0.9,0.99"
    )
    use_8bit_adam: bool = option(False, "older spelling of optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "older spelling of optimizer_type Lion")
    learning_rate: float = option(2e-6, "learning rate", ge=0)
    lr_scheduler: str = option("constant", "how the learning rate changes", choices=LR_SCHEDULERS)
    lr_scheduler_type: str = option(
        "",
        "a scheduler class in place of lr_scheduler: the name of one in torch.optim.lr_scheduler, such as "
        "CosineAnnealingLR, or a dotted path; lr_scheduler_args are its arguments",
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (), 'key=value arguments of the scheduler, such as step_rules="1:10,0.1:20,0.01" for piecewise_constant'
    )
    lr_scheduler_num_cycles: int = option(
        1, "cycles of cosine_with_restarts, cosine_with_min_lr and the decay of warmup_stable_decay", ge=1
    )
    lr_scheduler_power: float = option(1.0, "power of polynomial", gt=0)
    lr_scheduler_timescale: int | None = option(
        None, "timescale of inverse_sqrt in steps (unset: the warm-up, or 10000 without one)", ge=1
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "floor of cosine_with_min_lr, warmup_stable_decay and rex, as a share of the learning rate",
        ge=0,
        le=1,
    )
    lr_warmup_steps: int | float = option(0, "warm-up: steps, or a share of all steps (0.1 or 10%)")
    lr_decay_steps: int | float = option(
        0, "decay at the end of warmup_stable_decay: steps, or a share of all steps (0.1 or 10%)"
    )
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 switches clipping off", ge=0)

    @field_validator("optimizer_type")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        return optimizer_name(value)

    @field_validator("lr_scheduler_type")
    @classmethod
    def _known_scheduler(cls, value: str) -> str:
        return scheduler_class(value)

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

    @property
    def is_schedule_free(self) -> bool:
        """Whether the optimizer takes the place of a schedule; the names that sd-scripts goes by, and ours."""
        last = self.optimizer_type.rpartition(".")[2].lower()
        named = last.endswith("schedulefree") or last.startswith("schedulefree")
        return named and bool(self.optimizer_kwargs().get("use_schedulefree", True))

    @property
    def estimates_rate(self) -> bool:
        """Whether the optimizer finds the size of its steps itself, and wants a learning rate near 1."""
        return self.optimizer_type.rpartition(".")[2].lower().startswith(("dadapt", "prodigy"))

    @property
    def sets_rate(self) -> bool:
        """Whether the optimizer uses no learning rate at all: Adafactor with relative steps."""
        arguments = self.optimizer_kwargs()
        relative = arguments.get("relative_step", True) or arguments.get("warmup_init", False)
        return self.optimizer_type == "Adafactor" and bool(relative)


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
    near = difflib.get_close_matches(value, (*OPTIMIZERS, *TORCH_OPTIMIZERS), n=1)
    raise ValueError(f"is not an optimizer; {f'did you mean {near[0]}? ' if near else ''}{available}")


def scheduler_class(value: str) -> str:
    """A scheduler class as a dotted path; "" stays. Raises ValueError for a name that is not one."""
    if not value or value in TORCH_SCHEDULERS:
        return f"torch.optim.lr_scheduler.{value}" if value else ""
    if "." in value and all(part.isidentifier() for part in value.split(".")):
        return value
    near = difflib.get_close_matches(value, TORCH_SCHEDULERS, n=1)
    raise ValueError(
        f"is not a scheduler class; {f'did you mean {near[0]}? ' if near else ''}available: "
        f"{', '.join(TORCH_SCHEDULERS)}, or the dotted path of a class (named schedules go to lr_scheduler)"
    )
