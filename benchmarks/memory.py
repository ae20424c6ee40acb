"""Bytes per trained parameter of an update: unfused, fused, in groups, in bfloat16; and of frozen weights in float8.

    python benchmarks/memory.py [--width 1024] [--layers 12]

A stack of square Linears without biases takes two steps on one row, so that activations are next to nothing and all
tensors are of one size. Every allocation that the allocator of the CPU makes is traced, those inside kernels too; the
peak of the second step counts, when optimizer state is there. What arithmetic expects stands beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if TYPE_CHECKING:
    import torch

    from library.training.update import Update


@dataclass
class Peak:
    """Bytes that were allocated and not freed: `most` at any time, `left` at the end."""

    most: int = 0
    left: int = 0


@contextmanager
def traced() -> Iterator[Peak]:
    """Trace the CPU's allocations within; the numbers are there afterwards, relative to the start."""
    import torch

    peak = Peak()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        peak.left += event.nbytes()
        peak.most = max(peak.most, peak.left)


@dataclass(frozen=True)
class Case:
    """A way to update. expected: bytes per parameter that stay, and bytes per element of one tensor (or one group of
    `group` tensors) at the worst moment.
    """

    name: str
    full_bf16: bool
    fused: bool
    groups: int | None
    expected: tuple[float, float]
    optimizer: str = "AdamW"
    stochastic: bool = True

    def bytes_per_parameter(self, layers: int) -> float:
        """What arithmetic expects with `layers` tensors of one size."""
        at_once = -(-layers // self.groups) if self.groups else 1
        return self.expected[0] + self.expected[1] * at_once / layers


# AdamW: weights 4 + gradient 4 + two moments of 4. Fused: one gradient at a time, since that of the layer before is
# gone when the next is made. Full bf16: weights 2 + gradient 2 + moments 4 + 4, and for one tensor the weight in
# float32 (4), and while it is rounded the random bits (4), the results (2 + 2 + 2) and which values are finite (1),
# which is more than the gradient in float32 (4) while it is stepped; fused, its gradient (2) too. Nearest: all in
# bf16, and one gradient in float32 for the norm (4). bitsandbytes' CPU kernels take room of their own, which is not
# counted.
CASES = (
    Case("AdamW, float32", False, False, None, (16, 0)),
    Case("AdamW, float32, fused", False, True, None, (12, 4)),
    Case("AdamW, float32, fused in 3 groups", False, True, 3, (12, 4)),
    Case("AdamW, full bf16", True, False, None, (12, 15)),
    Case("AdamW, full bf16, fused", True, True, None, (10, 17)),
    Case("AdamW, full bf16, nearest rounding", True, False, None, (8, 4), stochastic=False),
    Case("AdamW, full bf16, fused, nearest", True, True, None, (6, 6), stochastic=False),
    Case("AdamW8bit, float32", False, False, None, (10, 0), "AdamW8bit"),
    Case("AdamW8bit, full bf16, fused", True, True, None, (4, 17), "AdamW8bit"),
    Case("Adafactor, full bf16, fused", True, True, None, (2, 17), "Adafactor"),
    Case("SGD, full bf16, fused", True, True, None, (2, 17), "torch.optim.SGD"),
)


def measure(case: Case, *, width: int, layers: int) -> float:
    """Peak bytes per parameter over the second step, weights and state included."""
    import torch

    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.full_bf16 else torch.float32
    x = torch.randn(1, width).to(dtype)
    with traced() as before:
        net = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers)])
        update = _update(case, list(net.parameters()))
        _step(net, update, x)
    with traced() as during:
        _step(net, update, x)
    return (before.left + during.most) / (layers * width * width)


def _update(case: Case, params: list[torch.nn.Parameter]) -> Update:
    from library.training.fused import FusedUpdate
    from library.training.optim import build_optimizer
    from library.training.tensor_step import Widening
    from library.training.update import GuardedUpdate

    arguments = {"relative_step": False, "scale_parameter": False} if case.optimizer == "Adafactor" else {}
    groups = [{"name": "all", "params": params, "lr": 1e-4}]
    optimizer = build_optimizer(groups, optimizer_type=case.optimizer, learning_rate=1e-4, arguments=arguments)
    widening = Widening(0, lambda: 0, stochastic=True) if case.full_bf16 and case.stochastic else None
    return FusedUpdate(optimizer, case.groups, widening) if case.fused else GuardedUpdate(optimizer, 0, None, widening)


def _step(net: torch.nn.Module, update: Update, x: torch.Tensor) -> None:
    loss = net(x).float().square().mean()
    with update.last_backward():
        loss.backward()
    update()


def frozen_bytes() -> dict[str, tuple[int, int]]:
    """Bytes of SDXL's U-Net and text encoders in bfloat16 and in float8, at full size and without a single weight."""
    import torch

    from library.models import fp8
    from library.models.arch import SDXL
    from library.models.assemble import empty_module

    parts = ("unet", "text_encoder_1", "text_encoder_2")
    modules = {part: empty_module(SDXL, part).to(torch.bfloat16).requires_grad_(False) for part in parts}
    return {part: tuple(fp8.store_as_float8(module)) for part, module in modules.items()}


def main(argv: list[str] | None = None) -> int:
    """Print both tables."""
    from benchmarks._machine import machine_class

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="rows and columns of each tensor")
    parser.add_argument("--layers", type=int, default=12, help="number of tensors")
    given = parser.parse_args(argv)
    print(f"{given.layers} tensors of {given.width} x {given.width}, {machine_class()}\n")
    print("| update | bytes per parameter | expected | with many tensors |\n|---|---|---|---|")
    for case in CASES:
        got = measure(case, width=given.width, layers=given.layers)
        many = case.expected[0] + (case.expected[1] / case.groups if case.groups else 0)
        print(f"| {case.name} | {got:.2f} | {case.bytes_per_parameter(given.layers):.2f} | {many:.4g} |", flush=True)
    print("\n| frozen, SDXL | bf16 | float8 |\n|---|---|---|")
    for part, (before, after) in frozen_bytes().items():
        print(f"| {part} | {before / 1e9:.3f} GB | {after / 1e9:.3f} GB |")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
