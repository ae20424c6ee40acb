"""Stepping an optimizer on a few of its tensors at a time, and stepping half-precision tensors in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from library.seeds import derive_seed
from library.training.rounding import round_stochastically


@dataclass
class Widening:
    """Lets an optimizer see float32 where parameters are bfloat16 or float16, and rounds what it leaves behind.

    stochastic: bfloat16 parameters are rounded up or down by chance (`round_stochastically`), else everything to the
    nearest value. The pattern is a function of (run seed, global step, place of the tensor in the optimizer): equal on
    all ranks, in a resumed run, and for every order in which tensors are stepped. State that the optimizer creates
    takes the float32 of what it sees.
    """

    run_seed: int
    global_step: Callable[[], int]
    stochastic: bool

    @contextmanager
    def around(self, numbered: Sequence[tuple[int, Tensor]]) -> Iterator[None]:
        """Within, the parameters (each with its place in the optimizer) and their gradients are float32.

        Costs 8 bytes per element of these parameters while it lasts. Their gradients are gone afterwards.
        """
        halves: list[tuple[int, Tensor, Tensor]] = []
        for index, p in numbered:
            if p.dtype in (torch.bfloat16, torch.float16):
                halves.append((index, p, p.data))
                _widen(p)
        try:
            yield
            for index, p, half in halves:
                p.grad = None  # rounding needs room of its own
                half.copy_(self._rounded(p.data, index, half.dtype))
        finally:
            for _, p, half in halves:
                p.grad = None
                p.data = half

    def _rounded(self, wide: Tensor, index: int, dtype: torch.dtype) -> Tensor:
        if not self.stochastic or dtype != torch.bfloat16:
            return wide
        generator = torch.Generator(wide.device)
        generator.manual_seed(derive_seed(self.run_seed, "rounding", self.global_step(), index))
        return round_stochastically(wide, generator)


def _widen(p: Tensor) -> None:
    """Make a parameter and its gradient float32; torch wants the gradient gone while the parameter changes."""
    grad = None if p.grad is None else p.grad.float()
    p.grad = None
    p.data = p.data.float()
    p.grad = grad


@dataclass
class TensorStepper:
    """Steps an optimizer on parts of its tensors, so that all parts together make one ordinary step.

    Each call sees a single parameter group that holds the given tensors only. What an optimizer counts per group
    (schedule-free ones do) is set back to the start of the step before each call, and so advances once per step.
    Only right for optimizers in which a tensor's update depends on nothing of other tensors: `looks_across_tensors`.
    """

    optimizer: torch.optim.Optimizer
    widening: Widening | None = None
    places: dict[Tensor, tuple[int, int]] = field(init=False)
    _before: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        pairs = [(g, p) for g, group in enumerate(self.optimizer.param_groups) for p in group["params"]]
        self.places = {p: (group, index) for index, (group, p) in enumerate(pairs)}

    def step(self, params: Sequence[Tensor]) -> None:
        """Step `params`, which are all of one parameter group; with a widening their gradients are gone afterwards."""
        self.call(self.optimizer.step, params)

    def call(self, method: Callable[[], Any], params: Sequence[Tensor]) -> None:
        """Let a method of the optimizer see `params` only; else like `step`."""
        if self.widening is None:
            self._call(method, params)
        else:
            with self.widening.around([(self.places[p][1], p) for p in params]):
                self._call(method, params)

    def step_everything(self) -> None:
        """One call for all tensors, for optimizers that look across them; a widening holds all of them in float32."""
        if self.widening is None:
            self.optimizer.step()
        else:
            with self.widening.around([(index, p) for p, (_, index) in self.places.items()]):
                self.optimizer.step()

    def finish(self) -> None:
        """The step is complete: the next call begins another one."""
        self._before = None

    def _call(self, method: Callable[[], Any], params: Sequence[Tensor]) -> None:
        groups = self.optimizer.param_groups
        if self._before is None:
            self._before = [_settings(group) for group in groups]
        number = self.places[params[0]][0]
        group, every_group = groups[number], list(groups)
        every_param = group["params"]
        for name in set(group) - set(self._before[number]) - {"params"}:
            del group[name]
        group.update(self._before[number])
        try:
            # In place: wrappers and schedules hold on to the list and to the group.
            groups[:] = [group]
            group["params"] = list(params)
            method()
        finally:
            group["params"] = every_param
            groups[:] = every_group


def widen_modes(optimizer: Any, widening: Widening) -> None:
    """Let a schedule-free optimizer go between its training and its evaluation weights in float32, tensor by tensor.

    Its state is float32, which it could not mix with half-precision weights. What it leaves is rounded to the nearest.
    No effect for optimizers without the two modes.
    """
    methods = {name: getattr(optimizer, name, None) for name in ("train", "eval")}
    if not all(callable(method) for method in methods.values()):
        return
    stepper = TensorStepper(optimizer, replace(widening, stochastic=False))

    def by_tensor(method: Callable[[], Any]) -> None:
        for p in stepper.places:
            stepper.call(method, [p])
        stepper.finish()

    for name, method in methods.items():
        setattr(optimizer, name, partial(by_tensor, method))


def fit_state(optimizer: torch.optim.Optimizer, widening: Widening | None) -> str:
    """Give loaded state the dtype that steps need, after a resume with another precision; a sentence, or "".

    Optimizers make state of the dtype of the weights they see: what was saved in half precision becomes float32 where
    they now see float32, and torch's own optimizers, which mix nothing, get float32 state back in half precision.
    """
    own = type(optimizer).__module__.startswith("torch.optim")
    changed = set()
    for p, state in optimizer.state.items():
        wanted = torch.float32 if widening is not None else p.dtype
        for name, value in state.items():
            is_moment = isinstance(value, Tensor) and value.is_floating_point() and value.shape == p.shape and p.ndim
            if is_moment and value.dtype != wanted and (own or wanted == torch.float32):
                changed.add(str(value.dtype).removeprefix("torch."))
                state[name] = value.to(wanted)
    return f"the optimizer's state was {', '.join(sorted(changed))} and is converted" if changed else ""


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def looks_across_tensors(make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> str:
    """Why the optimizer that `make` builds cannot be stepped tensor by tensor; "" when it can.

    It is found out by doing it: small tensors in two groups, with gradients of very different sizes, take some steps
    together and one by one. They must move alike, and what is kept per group must not depend on the tensor stepped.
    """
    together, _ = _trial(make, by_tensor=False)
    try:
        apart, same_settings = _trial(make, by_tensor=True)
    except Exception as error:  # whatever a third party's class raises is its answer
        return f"stepped on one tensor it fails: {error}"
    alike = all(float((a - b).abs().max()) <= 1e-3 * float(a.abs().max()) for a, b in zip(together, apart, strict=True))
    return "" if alike and same_settings else "how a tensor moves depends on the other tensors"


# Large enough for 8-bit state (4096 elements), and small ones. Sizes of gradients and the number of steps are such that
# estimates over all tensors (D-Adaptation, Prodigy) show.
_TRIAL_SHAPES = ((64, 80), (8, 12), (16, 4), (64, 80))
_TRIAL_SIZES = (1.0, 1e-2, 10.0, 0.3)
_TRIAL_STEPS = 12


def _trial(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], *, by_tensor: bool
) -> tuple[list[Tensor], bool]:
    """How far each tensor moved, and whether all tensors of a group left the same numbers in it."""
    source = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=source) * 1e-3) for shape in _TRIAL_SHAPES]
    starts = [p.detach().clone() for p in params]
    optimizer = make([{"name": f"trial{i}", "params": params[2 * i : 2 * i + 2], "lr": 1.0} for i in range(2)])
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    stepper, same_settings = TensorStepper(optimizer), True
    for _ in range(_TRIAL_STEPS):
        left: dict[int, dict[str, float]] = {}
        for size, p in zip(_TRIAL_SIZES, params, strict=True):
            p.grad = (torch.randn(p.shape, generator=source) + 0.5) * size
        for p in params if by_tensor else ():
            stepper.step([p])
            place = stepper.places[p][0]
            numbers = {k: float(v) for k, v in optimizer.param_groups[place].items() if isinstance(v, int | float)}
            same_settings &= left.setdefault(place, numbers) == numbers
        stepper.finish()
        if not by_tensor:
            optimizer.step()
    return [p.detach() - start for p, start in zip(params, starts, strict=True)], same_settings
