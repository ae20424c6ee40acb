"""What each kind of network costs: time of a training step on the tiny model over that of plain LoRA.

    python benchmarks/adapters.py [--steps 10] [--repeats 5]

Forward, loss, backward and AdamW on one batch of latents and text outputs. The kinds alternate within one process, so a
change of the machine's load hits all of them; each ratio is taken within its round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# kind -> (dim, alpha, network_args)
KINDS: dict[str, tuple[int, float, dict[str, str]]] = {
    "lora": (8, 4.0, {}),
    "dora": (8, 4.0, {}),
    "dora wd_on_output=false": (8, 4.0, {"wd_on_output": "false"}),
    "dylora": (8, 4.0, {"unit": "2"}),
    "lora_fa": (8, 4.0, {}),
    "oft": (4, 1e-3, {"enable_all_linear": "true"}),
}


def seconds(name: str, bundle, roots, *, steps: int) -> float:
    """Seconds per step of one kind, its network put on and taken off again."""
    import torch

    dim, alpha, args = KINDS[name]
    module = __import__(f"networks.{name.split()[0]}", fromlist=["create"])
    network = module.create(roots, dim=dim, alpha=alpha, args=args).train().attach()
    optimizer = torch.optim.AdamW(network.param_groups(1e-4, (), 1e-4))
    g = torch.Generator().manual_seed(0)
    arch = bundle.unet.config
    x, text = torch.randn(4, 4, 16, 16, generator=g), torch.randn(4, 77, arch.cross_attention_dim, generator=g)
    pooled = arch.projection_class_embeddings_input_dim - 6 * arch.addition_time_embed_dim
    added = {"text_embeds": torch.randn(4, pooled, generator=g), "time_ids": torch.full((4, 6), 128.0)}

    def step() -> None:
        out = bundle.unet(x, torch.full((4,), 500), encoder_hidden_states=text, added_cond_kwargs=added).sample
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    elapsed = time.perf_counter() - start
    network.detach()
    return elapsed / steps


def main(argv: list[str] | None = None) -> int:
    """Print the median ratio of each kind."""
    from benchmarks._machine import machine_class
    from library.inference.adapters import adapter_roots
    from library.models import checkpoint, memory

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all kinds")
    given = parser.parse_args(argv)
    bundle = checkpoint.load_bundle("tiny")
    memory.freeze(bundle)
    bundle.unet.train()
    roots = [root for root in adapter_roots(bundle) if root.part == "unet"]
    ratios: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(given.repeats):
        taken = {name: seconds(name, bundle, roots, steps=given.steps) for name in KINDS}
        for name, value in taken.items():
            ratios[name].append(value / taken["lora"])
    print(f"{given.repeats} rounds of {given.steps} steps, batch 4, {machine_class()}")
    for name, found in ratios.items():
        print(f"{name:26} {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
