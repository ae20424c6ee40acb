"""LoRA-FA: LoRA whose down weights stay at their random start, so their gradients and inputs need no memory.

Zhang et al. 2023, "LoRA-FA"; the file is an ordinary LoRA file (lora_format.md §3).
"""

import math

import torch
from torch import Tensor, nn

from networks._build import Family
from networks.lora import LoraAdapter


class LoraFaAdapter(LoraAdapter):
    """One module's LoRA-FA: down is drawn from N(0, 2 / (in + r)) and frozen, up starts at zero and trains."""

    plus_parameters = frozenset()

    def reset_down(self, generator: torch.Generator | None) -> None:
        """Draw the down weights (standard deviation sqrt(2 / (in + r)), in counted with the kernel) and freeze them."""
        weight = self.lora_down.weight
        fan_in = weight[0].numel()
        nn.init.normal_(weight, std=math.sqrt(2.0 / (fan_in + self.rank)), generator=generator)
        weight.requires_grad_(False)

    def shrink(self, ratio: Tensor) -> None:
        """Multiply the addition by `ratio` (0-d), all of it in the up weights: the down weights never change."""
        self.lora_up.weight.mul_(ratio.to(self.lora_up.weight.dtype))


_family = Family("lora_fa", LoraFaAdapter.of)
create = _family.create
create_from_weights = _family.create_from_weights
