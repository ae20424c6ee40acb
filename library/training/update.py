"""The guarded update: clip, then step the optimizer only when the gradient is finite."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class GuardedUpdate:
    """Clips by global norm and steps the optimizer unless the gradient holds an inf or a NaN.

    On CUDA with a fused optimizer the decision stays on the device (the fused kernels take `found_inf`); elsewhere it
    costs one read of a scalar per step. A skipped step leaves parameters and optimizer state as they were; `skipped`
    counts them (0-d float32 tensor on the parameters' device). With an fp16 gradient scaler, which has its own check,
    the scaler decides.
    """

    optimizer: torch.optim.Optimizer
    max_norm: float
    scaler: torch.amp.GradScaler | None = None
    skipped: Tensor = field(init=False)
    params: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.skipped = torch.zeros((), device=self.params[0].device)

    def __call__(self) -> Tensor:
        """Clip, step, clear the gradients; return the global L2 norm before clipping (0-d float32)."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).float()
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.max_norm, norm)
        bad = (~torch.isfinite(norm)).float().reshape(())
        self.skipped += bad.to(self.skipped.device)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif norm.is_cuda and self._is_fused():
            # What GradScaler itself hands to fused optimizers; the kernels then leave everything untouched.
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = bad
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _is_fused(self) -> bool:
        return all(group.get("fused") for group in self.optimizer.param_groups)
