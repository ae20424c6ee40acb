"""DyLoRA: one LoRA whose first k ranks are a LoRA of rank k, for every k that is a multiple of `unit`.

Valipour et al. 2022, "DyLoRA", the variant that updates only the last of the ranks in use. In training each call of
each module draws b from 0, unit, 2 unit, ... below r, and with k = b + unit

    y = W x + multiplier * (alpha / k) * up[:, :k](down[:k](x)),

gradients reaching the ranks b..k only. A file cut to k ranks with its alpha left as it is computes just that, and
k = r is the LoRA that is saved (lora_format.md §2, which says where sd-scripts differs).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from networks._args import LoraArgs
from networks._build import Family, Size
from networks.lora import LoraAdapter


class DyloraAdapter(LoraAdapter):
    """One module's DyLoRA; tensors and file are those of a LoRA of rank r, which is a multiple of `unit`."""

    def __init__(self, base: nn.Linear | nn.Conv2d, *, unit: int = 1, **settings) -> None:
        super().__init__(base, **settings)
        if self.rank % unit:
            raise UserError(f"unit={unit} does not divide the rank {self.rank}", "network_args", "set a unit that does")
        self.unit = unit

    def forward_delta(self, x: Tensor) -> Tensor:
        """In training that of a random number of ranks, else of all."""
        if not self.training:
            return super().forward_delta(x)
        # From torch's generator, which the trainer seeds for every micro-batch; on the CPU, so that nothing waits.
        first = int(torch.randint(self.rank // self.unit, ())) * self.unit
        return self.delta_of_ranks(x, first)

    def delta_of_ranks(self, x: Tensor, first: int) -> Tensor:
        """The addition of the ranks before first + unit, of which the last `unit` get gradients."""
        last = first + self.unit
        up, down = self.lora_up.weight, self.lora_down.weight
        used_down = torch.cat([down[:first].detach(), down[first:last]])
        used_up = torch.cat([up[:, :first].detach(), up[:, first:last]], dim=1)
        scale = self.scale * self.rank / last
        if isinstance(self.base, nn.Conv2d):
            geometry = {name: getattr(self.base, name) for name in ("stride", "padding", "dilation")}
            return F.conv2d(F.conv2d(x, used_down, **geometry), used_up) * scale
        return F.linear(F.linear(x, used_down), used_up) * scale


def _make(
    base: nn.Linear | nn.Conv2d, size: Size, args: LoraArgs, dropout: float, generator: torch.Generator | None
) -> DyloraAdapter:
    return DyloraAdapter(base, unit=args.unit, rank=size.rank, alpha=size.alpha, generator=generator)


_family = Family("dylora", _make)
create = _family.create
create_from_weights = _family.create_from_weights
