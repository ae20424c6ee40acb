"""The fused update: each tensor is stepped inside the backward pass, and its gradient freed at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto

import torch
from torch import Tensor

from library.training.tensor_step import TensorStepper, Widening
from library.training.update import kernels_can_skip, total_norm


class _During(Enum):
    """What a complete gradient is for: KEEP it for the next micro-batch, STEP with it, or FORGET it."""

    KEEP = auto()
    STEP = auto()
    FORGET = auto()


@dataclass
class _Unit:
    """Tensors of one parameter group that are stepped together, once `waiting` of them is 0."""

    params: list[Tensor]
    waiting: int = 0


@dataclass
class FusedUpdate:
    """Steps the optimizer while the last backward pass of a step is under way, and clears each gradient it has used.

    optimizer: one whose update of a tensor depends on nothing of other tensors (`looks_across_tensors`); it stays the
    one owner of state and rates, so that schedules, logs and saved states are the ordinary ones.
    num_groups: None steps every tensor by itself; a number steps ceil(tensors / num_groups) neighbours of a parameter
    group together, when the last of them has its gradient. widening: as in `GuardedUpdate`.

    Earlier micro-batches of a step add up their gradients as ever. There is no clipping, since the norm is known only
    at the end. What holds a gradient that is not finite (a tensor, or a group of them) is left as it is, state
    included, while the rest of the step counts; `skipped` counts such steps. That costs one read of a scalar per
    tensor or group, none on CUDA with an optimizer that has fused kernels.
    """

    optimizer: torch.optim.Optimizer
    num_groups: int | None = None
    widening: Widening | None = None
    skipped: Tensor = field(init=False)
    last_bad: Tensor = field(init=False)
    params: list[Tensor] = field(init=False)
    _during: _During = field(default=_During.KEEP, init=False)
    _norms: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.skipped = torch.zeros((), device=self.params[0].device)
        self.last_bad = torch.zeros_like(self.skipped)
        self._stepper = TensorStepper(self.optimizer, self.widening)
        self._units: list[_Unit] = []
        size = -(-len(self.params) // self.num_groups) if self.num_groups else 1
        for group in self.optimizer.param_groups:
            for start in range(0, len(group["params"]), size):
                self._units.append(_Unit(group["params"][start : start + size]))
        self._unit_of = {p: unit for unit in self._units for p in unit.params}
        for p in self.params:
            p.register_post_accumulate_grad_hook(self._on_gradient)

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Within, gradients are complete when they arrive."""
        for unit in self._units:
            unit.waiting = len(unit.params)
        self._during = _During.STEP
        try:
            yield
        finally:
            self._during = _During.KEEP

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """Within, gradients are freed as they arrive."""
        self._during = _During.FORGET
        try:
            yield
        finally:
            self._during = _During.KEEP

    def __call__(self) -> Tensor:
        """Step what has not been stepped yet; return the global L2 norm of the step's gradient (0-d float32).

        Left over are tensors that had a gradient from an earlier micro-batch and none from the last, and groups in
        which some tensor had none at all.
        """
        for unit in self._units:
            if any(p.grad is not None for p in unit.params):
                self._step(unit)
        self._stepper.finish()
        norm = torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else torch.zeros(())
        self.last_bad = (~torch.isfinite(norm)).float().to(self.skipped.device)
        self.skipped += self.last_bad
        self._norms.clear()
        return norm

    def _on_gradient(self, p: Tensor) -> None:
        if self._during is _During.FORGET:
            p.grad = None
        elif self._during is _During.STEP:
            unit = self._unit_of[p]
            unit.waiting -= 1
            if unit.waiting == 0:
                self._step(unit)

    @torch.no_grad()
    def _step(self, unit: _Unit) -> None:
        """Step a unit unless its gradient is not finite, and free its gradients."""
        params = [p for p in unit.params if p.grad is not None]
        norm = total_norm([p.grad for p in params])
        bad = ~torch.isfinite(norm)
        self._norms.append(norm)
        if norm.is_cuda and kernels_can_skip(self.optimizer):
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = bad.float()
            self._stepper.step(params)
        elif not bad:
            self._stepper.step(params)
        for p in unit.params:
            p.grad = None
