"""LoRA and LoCon: low-rank additions to Linear and Conv2d layers, in sd-scripts' file format.

y = W x + multiplier * (alpha / r) * up(drop(down(x))), r the rank (lora_format.md §1).
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks._adapter import Adapter
from networks._args import LoraArgs
from networks._build import Family, Size


class _Linear(nn.Linear):
    """Its weights are drawn afterwards; `nn.utils.skip_init`, by the meta device, takes several times as long."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class _Conv2d(nn.Conv2d):
    """The same."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class LoraAdapter(Adapter):
    """One module's LoRA: down (r, in) and up (out, r), or for a Conv2d down (r, in, kh, kw) and up (out, r, 1, 1).

    Down starts kaiming-uniform (a = sqrt 5), up zero, so at the start the model is exactly the base model.
    """

    plus_parameters = frozenset({"lora_up.weight"})

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        *,
        rank: int,
        alpha: float | None,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        self.rank = rank
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        # Made on the CPU, so that a seed gives the same start on every device; meta stays meta.
        device = "meta" if base.weight.is_meta else "cpu"
        if isinstance(base, nn.Conv2d):
            geometry = {"kernel_size": base.kernel_size, "stride": base.stride, "padding": base.padding}
            self.lora_down = _Conv2d(
                base.in_channels, rank, **geometry, dilation=base.dilation, bias=False, device=device
            )
            self.lora_up = _Conv2d(rank, base.out_channels, 1, bias=False, device=device)
        else:
            self.lora_down = _Linear(base.in_features, rank, bias=False, device=device)
            self.lora_up = _Linear(rank, base.out_features, bias=False, device=device)
        self.reset_down(generator)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha or rank), device=device))
        self.scale = float(alpha or rank) / rank  # a plain number: reading the buffer would wait for the GPU
        self.register_load_state_dict_post_hook(lambda module, _: module._refresh_scale())

    def reset_down(self, generator: torch.Generator | None) -> None:
        """Draw the start of the down weights."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator)

    def _refresh_scale(self) -> None:
        self.scale = float(self.alpha) / self.rank

    def load_file_tensors(self, values: Mapping[str, Tensor]) -> None:
        """Take over a file's tensors; an alpha that is missing is the rank."""
        alpha = values.get("alpha", torch.tensor(float(self.rank)))
        self.load_state_dict({**values, "alpha": alpha.float().reshape(())})

    def forward_delta(self, x: Tensor) -> Tensor:
        """(alpha / r) * up(drop(down(x))), in training with the three dropouts."""
        if self.is_skipped():
            return self.untouched()
        h, scale = self.dropped(self.lora_down(x))
        return self.lora_up(h * scale)  # on r numbers a token, not on all outputs

    def is_skipped(self) -> bool:
        """Whether module dropout leaves this call out; drawn anew at each call."""
        return self.training and bool(self.module_dropout) and bool(torch.rand(()) < self.module_dropout)

    def untouched(self) -> Tensor:
        """0 with a zero gradient for every trained parameter, since DDP needs all of them touched on every rank."""
        return sum(p.sum() for p in self.parameters() if p.requires_grad) * torch.zeros((), device=self.alpha.device)

    def dropped(self, h: Tensor) -> tuple[Tensor, float]:
        """The low-rank activations after neuron and rank dropout, and the scale that goes with them."""
        scale = self.scale
        if self.training and self.dropout:
            h = F.dropout(h, self.dropout)
        if self.training and self.rank_dropout:
            rank_dim = 1 if h.ndim == 4 else h.ndim - 1
            shape = [h.shape[d] if d in (0, rank_dim) else 1 for d in range(h.ndim)]
            h = h * (torch.rand(shape, device=h.device) > self.rank_dropout).to(h.dtype)
            scale = scale / (1.0 - self.rank_dropout)
        return h, scale

    def delta_weight(self) -> Tensor:
        """(alpha / r) * up @ down as a float32 weight of the base's shape."""
        up = self.lora_up.weight.float().flatten(1)
        down = self.lora_down.weight.float().flatten(1)
        return (up @ down * self.scale).reshape(self.base.weight.shape)

    @torch.no_grad()
    def limit_norm(self, limit: float) -> tuple[Tensor, Tensor]:
        """As `Adapter.limit_norm`: both factors times the root of the ratio (lora_format.md §1, scale_weight_norms)."""
        norm = self.delta_norm()
        counted = norm.clamp_min(limit / 2)
        ratio = counted.clamp_max(limit) / counted
        self.shrink(ratio)
        return norm * ratio, (ratio != 1).float()

    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta_weight`, 0-d float32, without making it: |BA|^2 = tr((B^T B)(A A^T))."""
        up, down = self.lora_up.weight.float().flatten(1), self.lora_down.weight.float().flatten(1)
        square = ((up.T @ up) * (down @ down.T)).sum()
        return square.clamp_min(0).sqrt() * abs(self.scale)

    def shrink(self, ratio: Tensor) -> None:
        """Multiply the addition by `ratio` (0-d), spread evenly over both factors."""
        root = ratio.sqrt()
        for factor in (self.lora_up.weight, self.lora_down.weight):
            factor.mul_(root.to(factor.dtype))

    @classmethod
    def of(
        cls,
        base: nn.Linear | nn.Conv2d,
        size: Size,
        args: LoraArgs,
        dropout: float,
        generator: torch.Generator | None,
        **settings: Any,
    ) -> Self:
        """The adapter of one module with the size and the arguments of a run; `settings` are those of a relative."""
        return cls(
            base,
            rank=size.rank,
            alpha=size.alpha,
            dropout=dropout,
            rank_dropout=args.rank_dropout,
            module_dropout=args.module_dropout,
            generator=generator,
            **settings,
        )


_family = Family("lora", LoraAdapter.of)
create = _family.create
create_from_weights = _family.create_from_weights
