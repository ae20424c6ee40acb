"""What the trainer costs: time per step of the real loop against a bare loop over the same U-Net, LoRA and batch.

    python benchmarks/trainer_overhead.py [--steps 40] [--repeats 5]

Both train the demo's LoRA on the tiny model from cached latents and captions. The trainer is started as users start it,
less the process: settings, data, caches, hooks, logs. The bare loop is what one would write by hand in ten lines, on
the last batch that the trainer saw. The two alternate within one process, so a change of the machine's load hits both;
the ratio is taken within each pair.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.data.types import Batch

WARM_UP = 10  # steps, and the logging interval: times are known only at its ends


def settings(folder: Path, steps: int) -> RunConfig:
    """The demo's run, shortened to `steps` after the warm-up, with everything written below `folder`."""
    from library.config.cli import parse

    config = ["--config_file", str(ROOT / "demo" / "lora.toml"), "--train_data_dir", str(folder / "dataset")]
    config += ["--max_train_steps", str(WARM_UP + steps), "--log_every_n_steps", str(WARM_UP)]
    config += ["--output_dir", str(folder / "out"), "--console_log_level", "WARNING"]
    return parse("sdxl_train_network", config)


def trainer_seconds(folder: Path, steps: int) -> tuple[float, Batch]:
    """Seconds per step of the real trainer after its warm-up, and the last batch it saw."""
    from library.training.launch import train
    from library.training.trainables.network import NetworkTrainable

    class Recording(NetworkTrainable):
        """Keeps the batch that the step is about to use."""

        def forward_scope(self, batch):
            self.batch = batch
            return super().forward_scope(batch)

    shutil.rmtree(folder / "out", ignore_errors=True)
    cfg = settings(folder, steps)
    trainable = Recording(cfg)
    train(cfg, trainable)
    log = (folder / "out" / "zxq-log.jsonl").read_text(encoding="utf-8")
    at = {record["step"]: record["time"] for record in map(json.loads, log.splitlines())}
    return (at[WARM_UP + steps] - at[WARM_UP]) / steps, trainable.batch


class BareLoop:
    """The same work without the trainer: forward, loss, backward, clip, AdamW."""

    def __init__(self, folder: Path, batch: Batch) -> None:
        import torch
        from torch.nn.utils import clip_grad_norm_

        from library.models import checkpoint, memory
        from library.training.trainables.network import NetworkTrainable

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        bundle = checkpoint.load_bundle("tiny", device=self.device)
        memory.freeze(bundle)
        bundle.unet.train()
        network = NetworkTrainable(settings(folder, WARM_UP)).attach(bundle)
        network.to(self.device)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.bundle, self.batch, self.clip = bundle, batch.to(self.device), clip_grad_norm_

    def step(self) -> None:
        """One optimizer step."""
        import torch

        batch, schedule = self.batch, self.bundle.schedule
        latents = batch.latents_B4hw * self.bundle.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (len(latents),), device=latents.device)
        conditioning = {"text_embeds": batch.text.pooled_BP, "time_ids": batch.sizes_B6}
        noisy = schedule.add_noise(latents, noise, t)
        prediction = self.bundle.unet(
            noisy, t, encoder_hidden_states=batch.text.hidden_BTD, added_cond_kwargs=conditioning
        ).sample
        torch.nn.functional.mse_loss(prediction, noise).backward()
        self.clip(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, steps: int) -> float:
        """Seconds per step over `steps`."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._wait()
        return (time.perf_counter() - start) / steps

    def _wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


def compare(folder: Path, *, steps: int, repeats: int) -> list[tuple[float, float]]:
    """(bare, trainer) seconds per step of each pair, alternating; the first trainer run fills the caches."""
    _, batch = trainer_seconds(folder, WARM_UP)
    bare = BareLoop(folder, batch)
    bare.seconds(WARM_UP)
    pairs = []
    for number in range(repeats):
        pair = bare.seconds(steps), trainer_seconds(folder, steps)[0]
        pairs.append(pair)
        print(f"pair {number + 1}: bare {1 / pair[0]:.2f} steps/s, trainer {1 / pair[1]:.2f} steps/s", flush=True)
    return pairs


def main(argv: list[str] | None = None) -> int:
    """Print every pair and the median ratio."""
    from benchmarks._machine import machine_class

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help=f"steps of a block, a multiple of {WARM_UP}")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of blocks")
    given = parser.parse_args(argv)
    if given.steps % WARM_UP:
        parser.error(f"--steps must be a multiple of {WARM_UP}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "demo" / "dataset", folder / "dataset", ignore=shutil.ignore_patterns("*.npz"))
        pairs = compare(folder, steps=given.steps, repeats=given.repeats)
    ratios = sorted(trainer / bare for bare, trainer in pairs)
    bare, trainer = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"\n{len(pairs)} pairs of {given.steps} steps, batch 4, {machine_class()}")
    print(f"bare loop {1 / bare:.2f} steps/s, trainer {1 / trainer:.2f} steps/s (medians)")
    print(f"time of a step, trainer / bare: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
