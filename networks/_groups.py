"""Which parameters of a network learn how fast: parts, blocks, LoRA+, rules."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from networks._adapter import Adapter
from networks._args import LoraArgs
from networks._blocks import block_index
from networks._keys import PARTS

GROUP_NAMES = {"te1": "textencoder1", "te2": "textencoder2", "unet": "unet"}


@dataclass(frozen=True)
class RatePlan:
    """What deviates from one learning rate for a part.

    plus: part -> how much faster up weights learn (LoRA+, Hayou et al. 2024). blocks: factor of the rate of each of the
    U-Net's 23 blocks. rules: module name -> (number of the rule from 1, absolute rate).
    """

    plus: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[float, ...] | None = None
    rules: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, args: LoraArgs, rules: Mapping[str, tuple[int, float]]) -> "RatePlan":
        """As network_args say."""
        plus = {part: ratio for part in PARTS if (ratio := args.plus_ratio(part)) is not None}
        return cls(plus, args.block_rates, rules)


def part_groups(part: str, adapters: Mapping[str, Adapter], *, rate: float, plan: RatePlan) -> list[dict[str, object]]:
    """The optimizer groups of one part, whose rate is `rate`; what has the rate 0 is frozen here and in no group.

    Blocks come in their order, then rules; each is followed by its LoRA+ twin.
    """
    found: dict[tuple[int, str], tuple[float, list[nn.Parameter], list[nn.Parameter]]] = {}
    for name, adapter in adapters.items():
        order, label, own = _place(part, name, rate, plan)
        if not rate or not own:
            adapter.requires_grad_(False)
            continue
        _, plain, faster = found.setdefault((order, label), (own, [], []))
        for key, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                (faster if key in adapter.plus_parameters and part in plan.plus else plain).append(parameter)
    groups = []
    for (_, label), (own, plain, faster) in sorted(found.items(), key=lambda item: item[0]):
        if plain:
            groups.append({"name": label, "params": plain, "lr": own})
        if faster:
            groups.append({"name": f"{label} plus", "params": faster, "lr": own * plan.plus[part]})
    return groups


def _place(part: str, name: str, rate: float, plan: RatePlan) -> tuple[int, str, float]:
    """(order, group name, rate) of a module."""
    if name in plan.rules:
        number, own = plan.rules[name]
        return 100 + number, f"{GROUP_NAMES[part]} rule{number}", own
    block = block_index(name) if part == "unet" else None
    if plan.blocks is not None and block is not None:
        return block, f"unet_block{block}", rate * plan.blocks[block]
    return 0, GROUP_NAMES[part], rate
