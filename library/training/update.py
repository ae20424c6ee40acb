"""The guarded update: clip, then step the optimizer only when the gradient is finite."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from library.training.tensor_step import TensorStepper, Widening


class Update(Protocol):
    """What the loop knows of an update; called once after the last backward pass of a step.

    params: all trained tensors. skipped: how many steps were left out in whole or in part because of a gradient that
    is not finite. last_bad: 1.0 when the last step was one of them, else 0.0. Both are 0-d float32. widening: how
    half-precision parameters are stepped in float32, None where they are not.
    """

    optimizer: torch.optim.Optimizer
    params: list[Tensor]
    skipped: Tensor
    last_bad: Tensor
    widening: Widening | None

    def __call__(self) -> Tensor:
        """Do what is left of the step, clear the gradients; return the global L2 norm before clipping (0-d float32)."""
        ...

    def last_backward(self) -> AbstractContextManager:
        """A context around the last backward pass of a step, the one that completes the gradients."""
        ...

    def discarding(self) -> AbstractContextManager:
        """A context around a backward pass whose gradients nobody wants."""
        ...


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm over all tensors, 0-d float32; half-precision gradients are summed in float32. 0 for none."""
    if not grads:
        return torch.zeros(())
    halves = any(g.dtype in (torch.bfloat16, torch.float16) for g in grads)
    norms = torch._foreach_norm(list(grads), 2, torch.float32) if halves else torch._foreach_norm(list(grads))
    device = grads[0].device
    return torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms])).float()


def kernels_can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every group is stepped by torch's fused kernels, which leave everything untouched on `found_inf`."""
    return all(group.get("fused") for group in optimizer.param_groups)


@dataclass
class GuardedUpdate:
    """Clips by global norm and steps the optimizer unless the gradient holds an inf or a NaN.

    On CUDA with a fused optimizer the decision stays on the device (the fused kernels take `found_inf`); elsewhere it
    costs one read of a scalar per step. A skipped step leaves parameters and optimizer state as they were; `skipped`
    counts them. With an fp16 gradient scaler, which has its own check, the scaler decides.

    widening: how half-precision parameters (full bf16, full fp16) are stepped in float32. by_tensor: then tensor after
    tensor, with one of them in float32 at a time; False, for optimizers that look across tensors, holds all of them.
    """

    optimizer: torch.optim.Optimizer
    max_norm: float
    scaler: torch.amp.GradScaler | None = None
    widening: Widening | None = None
    by_tensor: bool = True
    skipped: Tensor = field(init=False)
    last_bad: Tensor = field(init=False)
    params: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.skipped = torch.zeros((), device=self.params[0].device)
        self.last_bad = torch.zeros_like(self.skipped)
        self._stepper = TensorStepper(self.optimizer, self.widening)

    def last_backward(self) -> AbstractContextManager:
        """Nothing happens during a backward pass."""
        return nullcontext()

    def discarding(self) -> AbstractContextManager:
        """Nothing happens during a backward pass; the caller clears the gradients."""
        return nullcontext()

    def __call__(self) -> Tensor:
        """Clip, step, clear the gradients; return the global L2 norm before clipping (0-d float32)."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = total_norm([p.grad for p in self.params if p.grad is not None])
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.max_norm, norm)
        self.last_bad = (~torch.isfinite(norm)).float().reshape(()).to(self.skipped.device)
        self.skipped += self.last_bad
        if self.scaler is not None and self.widening is None:
            self.scaler.step(self.optimizer)
        elif self.scaler is None and norm.is_cuda and kernels_can_skip(self.optimizer):
            # What GradScaler itself hands to fused optimizers; the kernels then leave everything untouched.
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = self.last_bad
            self._step()
        elif not self.last_bad:
            self._step()
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _step(self) -> None:
        if self.widening is None or not self.by_tensor:
            self._stepper.step_everything()
            return
        for p in self.params:
            if p.grad is not None:
                self._stepper.step([p])
        self._stepper.finish()
