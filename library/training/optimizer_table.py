"""The optimizers that have a name of their own: one row each, nothing imported until it is asked for.

Names and what stands behind them follow sd-scripts (spec page "flags", section "Optimizers"); the rows below the line
are further ones that people train SDXL with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """`path`: the class. `defaults`: keywords that it gets unless the user gives them."""

    path: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


# The package to install for a module, where the two have different names.
DISTRIBUTIONS = {
    "lion_pytorch": "lion-pytorch",
    "came_pytorch": "came-pytorch",
    "prodigyplus": "prodigy-plus-schedule-free",
}

ROWS: dict[str, Row] = {
    "AdamW": Row("torch.optim.AdamW"),
    "AdamW8bit": Row("bitsandbytes.optim.AdamW8bit"),
    "PagedAdamW": Row("bitsandbytes.optim.PagedAdamW"),
    "PagedAdamW8bit": Row("bitsandbytes.optim.PagedAdamW8bit"),
    "PagedAdamW32bit": Row("bitsandbytes.optim.PagedAdamW32bit"),
    "Lion": Row("lion_pytorch.Lion"),
    "Lion8bit": Row("bitsandbytes.optim.Lion8bit"),
    "PagedLion8bit": Row("bitsandbytes.optim.PagedLion8bit"),
    "SGDNesterov": Row("torch.optim.SGD", {"nesterov": True, "momentum": 0.9}),
    # bitsandbytes accepts nesterov=True and does nothing with it (0.50.2): this is plain momentum, there as here.
    "SGDNesterov8bit": Row("bitsandbytes.optim.SGD8bit", {"momentum": 0.9}),
    "DAdaptation": Row("dadaptation.experimental.DAdaptAdamPreprint"),
    "DAdaptAdamPreprint": Row("dadaptation.experimental.DAdaptAdamPreprint"),
    "DAdaptAdaGrad": Row("dadaptation.DAdaptAdaGrad"),
    "DAdaptAdam": Row("dadaptation.DAdaptAdam"),
    "DAdaptAdan": Row("dadaptation.DAdaptAdan"),
    "DAdaptAdanIP": Row("dadaptation.experimental.DAdaptAdanIP"),
    "DAdaptLion": Row("dadaptation.DAdaptLion"),
    "DAdaptSGD": Row("dadaptation.DAdaptSGD"),
    "Prodigy": Row("prodigyopt.Prodigy"),
    "Adafactor": Row("transformers.optimization.Adafactor"),
    "RAdamScheduleFree": Row("schedulefree.RAdamScheduleFree"),
    "AdamWScheduleFree": Row("schedulefree.AdamWScheduleFree"),
    "SGDScheduleFree": Row("schedulefree.SGDScheduleFree"),
    # ---
    # Its own stochastic rounding (on by default, for bf16 weights) draws from the global generator, which differs
    # between ranks: their weights would part.
    "ProdigyPlusScheduleFree": Row("prodigyplus.ProdigyPlusScheduleFree", {"stochastic_rounding": False}),
    "CAME": Row("came_pytorch.CAME"),
    "AdEMAMix": Row("bitsandbytes.optim.AdEMAMix"),
    "AdEMAMix8bit": Row("bitsandbytes.optim.AdEMAMix8bit"),
    "PagedAdEMAMix8bit": Row("bitsandbytes.optim.PagedAdEMAMix8bit"),
    "Adan": Row("pytorch_optimizer.Adan"),
    "ADOPT": Row("pytorch_optimizer.ADOPT"),
    "StableAdamW": Row("pytorch_optimizer.StableAdamW"),
    "SOAP": Row("pytorch_optimizer.SOAP"),
}
