"""Learning-rate schedules by name, by class, or set by the optimizer itself.

A schedule is stepped once per optimizer step on every rank and counts optimizer steps. Most are functions of diffusers
or transformers; spec page "flags" says which numbers sd-scripts gives them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from library.errors import UserError
from library.training.optim import check_plain_data, import_class

if TYPE_CHECKING:
    from library.config.optim import OptimOptions


@dataclass(frozen=True)
class LrSettings:
    """What a run says about its schedule.

    name: one of SCHEDULES. cls: a class that takes its place, as a dotted path or a name of torch.optim.lr_scheduler.
    warmup, decay: steps (int) or a share of all steps (float, 0..1). timescale: steps, None for the warm-up's length
    (10,000 without one). min_ratio: floor as a share of the rate, None for that of the schedule.
    """

    name: str = "constant"
    cls: str = ""
    warmup: int | float = 0
    decay: int | float = 0
    num_cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    min_ratio: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def lr_settings(optim: OptimOptions) -> LrSettings:
    """The schedule that the options ask for; constant under a schedule-free optimizer, as in sd-scripts."""
    if optim.is_schedule_free:
        return LrSettings()
    return LrSettings(
        name=optim.lr_scheduler,
        cls=optim.lr_scheduler_type,
        warmup=optim.lr_warmup_steps,
        decay=optim.lr_decay_steps,
        num_cycles=optim.lr_scheduler_num_cycles,
        power=optim.lr_scheduler_power,
        timescale=optim.lr_scheduler_timescale,
        min_ratio=optim.lr_scheduler_min_lr_ratio,
        arguments=optim.scheduler_kwargs(),
    )


@dataclass(frozen=True)
class Lengths:
    """Lengths in optimizer steps."""

    total: int
    warmup: int
    decay: int

    @property
    def ends(self) -> dict[str, int]:
        """What most schedules ask for."""
        return {"num_warmup_steps": self.warmup, "num_training_steps": self.total}


@dataclass(frozen=True)
class Schedule:
    """One named schedule: the function that makes it and what that function is told."""

    function: str
    keywords: Callable[[LrSettings, Lengths], dict[str, Any]]


def _floor(s: LrSettings) -> dict[str, Any]:
    return {} if s.min_ratio is None else {"min_lr_rate": s.min_ratio}


def _stable(s: LrSettings, n: Lengths) -> dict[str, Any]:
    return {
        "num_warmup_steps": n.warmup,
        "num_stable_steps": n.total - n.warmup - n.decay,
        "num_decay_steps": n.decay,
        "num_cycles": s.num_cycles / 2,
        "min_lr_ratio": s.min_ratio or 0.0,
    }


# sd-scripts counts cycles of a cosine from peak to floor; transformers counts whole periods, hence the halves.
SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule("diffusers.optimization.get_constant_schedule", lambda s, n: {}),
    "constant_with_warmup": Schedule(
        "diffusers.optimization.get_constant_schedule_with_warmup", lambda s, n: {"num_warmup_steps": n.warmup}
    ),
    "linear": Schedule("diffusers.optimization.get_linear_schedule_with_warmup", lambda s, n: n.ends),
    "cosine": Schedule("diffusers.optimization.get_cosine_schedule_with_warmup", lambda s, n: n.ends),
    "cosine_with_restarts": Schedule(
        "diffusers.optimization.get_cosine_with_hard_restarts_schedule_with_warmup",
        lambda s, n: {**n.ends, "num_cycles": s.num_cycles},
    ),
    "cosine_with_min_lr": Schedule(
        "transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup",
        lambda s, n: {**n.ends, "num_cycles": s.num_cycles / 2, **_floor(s)},
    ),
    "cosine_warmup_with_min_lr": Schedule(
        "transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
        lambda s, n: {**n.ends, "num_cycles": s.num_cycles / 2, **_floor(s)},
    ),
    "polynomial": Schedule(
        "diffusers.optimization.get_polynomial_decay_schedule_with_warmup", lambda s, n: {**n.ends, "power": s.power}
    ),
    "inverse_sqrt": Schedule(
        "transformers.optimization.get_inverse_sqrt_schedule",
        lambda s, n: {"num_warmup_steps": n.warmup, "timescale": s.timescale},
    ),
    "warmup_stable_decay": Schedule("transformers.optimization.get_wsd_schedule", _stable),
    "piecewise_constant": Schedule("diffusers.optimization.get_piecewise_constant_schedule", lambda s, n: {}),
    "rex": Schedule("library.training.lr.rex_schedule", lambda s, n: {**n.ends, "min_lr_ratio": s.min_ratio or 0.0}),
}
WITHOUT_WARMUP = ("constant", "piecewise_constant")
NOT_KNOWN_YET = 10**9  # steps of a run whose length only its data will tell


def steps_from(value: int | float, total: int) -> int:
    """A length in optimizer steps: an int is a count, a float in 0..1 a share of `total` (truncated)."""
    return int(value * total) if isinstance(value, float) else value


def build_scheduler(optimizer: torch.optim.Optimizer, settings: LrSettings, *, total_steps: int) -> Any:
    """The schedule over `total_steps` optimizer steps.

    Raises UserError where warm-up and decay do not fit, or where the schedule refuses its arguments.
    """
    if any(group["lr"] is None for group in optimizer.param_groups):
        return _Relative(optimizer)
    lengths = Lengths(total_steps, steps_from(settings.warmup, total_steps), steps_from(settings.decay, total_steps))
    if settings.cls:
        return _by_class(optimizer, settings, total_steps)
    if settings.name == "adafactor":
        raise UserError(
            "lr_scheduler adafactor shows the rate that Adafactor sets itself; this optimizer does not set one",
            where="--lr_scheduler",
            fix='use optimizer_type = "Adafactor" with its relative steps, or another schedule',
        )
    if settings.name in WITHOUT_WARMUP and lengths.warmup:
        raise UserError(
            f"the {settings.name} schedule has no warm-up, but lr_warmup_steps is {settings.warmup}",
            where="--lr_scheduler",
            fix='use lr_scheduler = "constant_with_warmup", or lr_warmup_steps = 0',
        )
    if settings.name == "warmup_stable_decay" and lengths.warmup + lengths.decay > total_steps:
        raise UserError(
            f"warm-up ({lengths.warmup} steps) and decay ({lengths.decay}) are longer than the run ({total_steps})",
            where="--lr_warmup_steps, --lr_decay_steps",
            fix="shorten one of them, or give both as shares such as 10%",
        )
    if settings.name == "polynomial" and lengths.warmup >= total_steps:  # it would divide by the 0 steps that are left
        raise UserError(
            f"the warm-up ({lengths.warmup} steps) leaves nothing of the run ({total_steps}) for the schedule",
            where="--lr_warmup_steps",
            fix="shorten it, or give it as a share such as 10%",
        )
    row = SCHEDULES[settings.name]
    function = import_class(row.function, where="--lr_scheduler", needed_by=settings.name)
    return _made(function, optimizer, {**row.keywords(settings, lengths), **settings.arguments}, settings.name)


def _made(make: Callable[..., Any], optimizer: torch.optim.Optimizer, keywords: dict[str, Any], name: str) -> Any:
    try:
        return make(optimizer, **keywords)
    except Exception as error:  # functions and classes of many libraries, each with errors of its own
        raise UserError(
            f"the schedule {name} refuses its settings: {error or type(error).__name__}",
            where="--lr_scheduler_args",
            fix="remove or correct the argument named above",
        ) from error


def _by_class(optimizer: torch.optim.Optimizer, settings: LrSettings, total_steps: int) -> Any:
    where = f"--lr_scheduler_type {settings.cls}"
    path = settings.cls if "." in settings.cls else f"torch.optim.lr_scheduler.{settings.cls}"
    found = import_class(path, where=where, needed_by=settings.cls)
    missing = [name for name in ("step", "get_last_lr", "state_dict", "load_state_dict") if not hasattr(found, name)]
    if not isinstance(found, type) or missing:
        raise UserError(
            f"{path} is not a scheduler class", where=where, fix="name a torch.optim.lr_scheduler.LRScheduler subclass"
        )
    required = [
        p.name
        for p in list(inspect.signature(found.step).parameters.values())[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required:
        raise UserError(
            f"{path} wants to be told {', '.join(required)} at every step, which training does not measure",
            where=where,
            fix="use a schedule that depends on the step only",
        )
    scheduler = _made(found, optimizer, dict(settings.arguments), settings.cls)
    own = getattr(scheduler, "total_steps", None)  # OneCycleLR cannot be stepped further
    if isinstance(own, int) and own < total_steps < NOT_KNOWN_YET:
        raise UserError(
            f"the schedule ends after {own} steps, the run after {total_steps}",
            where=where,
            fix=f'set lr_scheduler_args = ["total_steps={total_steps}"]',
        )
    check_plain_data(scheduler.state_dict(), path, where=where)
    return scheduler


def rex_factor(step: int, *, warmup: int, total: int, min_ratio: float = 0.0, d: float = 0.5) -> float:
    """The share of the rate at `step` (0..total): linear warm-up from 0, then f = (1-p) / (1-d + d(1-p)).

    p: progress after the warm-up, 0..1; d = 1/2 is the REX schedule of Chen, Wolfe, Kyrillidis 2021
    (arXiv:2107.04197), 0 is linear, towards 1 the rate stays high for longer. min_ratio m: m + (1-m) f.
    """
    if step < warmup:
        return step / warmup
    left = 1 - min(1.0, (step - warmup) / max(1, total - warmup))
    return min_ratio + (1 - min_ratio) * left / (1 - d + d * left)


def rex_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    min_lr_ratio: float = 0.0,
    d: float = 0.5,
) -> LambdaLR:
    """`rex_factor` as a schedule. Raises ValueError for d outside 0..1 (1 excluded)."""
    if not 0 <= d < 1:
        raise ValueError(f"d is {d}, but must be at least 0 and less than 1")
    factor = partial(rex_factor, warmup=num_warmup_steps, total=num_training_steps, min_ratio=min_lr_ratio, d=d)
    return LambdaLR(optimizer, factor)


class _Relative:
    """Stands in for a schedule when the optimizer (Adafactor with relative_step) sets its own rate."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        """Nothing to do: the optimizer derives the rate from its own step count."""

    def get_last_lr(self) -> list[float]:
        """The rate that the optimizer used last, per group (0.0 before the first step)."""
        rates = []
        for group in self.optimizer.param_groups:
            state = self.optimizer.state.get(group["params"][0], {})
            rates.append(float(self.optimizer._get_lr(group, state)) if state else 0.0)
        return rates

    def state_dict(self) -> dict:
        """Empty: the optimizer's state holds the step count."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""
