"""Does a LoRA learn? The share of the new concept's colours in generated pictures, before and after training.

    python benchmarks/learning.py [--seeds 1 2 3] [--steps 500]

Trains the demo's LoRA (demo/lora.toml) and draws "a zxq" on the five backgrounds of the training pictures, with and
without it, through the real scripts. The share is that of magenta and lime pixels, mean over the pictures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROMPTS = [f"a zxq on a {colour} background" for colour in ("white", "black", "blue", "green", "yellow")]


def drawn_share(folder: Path, *flags: str) -> float:
    """Draw PROMPTS twice each into `folder`; the mean share of the concept's colours, 0..1."""
    import numpy as np
    from PIL import Image

    import sdxl_gen_img
    from tools.tiny.scorer import concept_share

    folder.mkdir(parents=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{text} --d {seed}\n" for seed in (1, 2) for text in PROMPTS))
    arguments = ["--ckpt=tiny", f"--from_file={prompts}", f"--outdir={folder}", "--steps=10", "--scale=3"]
    arguments += ["--sampler=euler_a", "--batch_size=10", *flags]
    if sdxl_gen_img.main(arguments):
        raise SystemExit("generation failed")
    shares = [sum(concept_share(np.asarray(Image.open(path).convert("RGB")))) for path in folder.glob("*.png")]
    assert len(shares) == 2 * len(PROMPTS)
    return float(np.mean(shares))


def before_and_after(folder: Path, *, seed: int, steps: int) -> tuple[float, float]:
    """Shares without and with a LoRA that was trained for `steps` with `seed`."""
    import shutil

    import sdxl_train_network

    dataset = folder / "dataset"
    shutil.copytree(ROOT / "demo" / "dataset", dataset, ignore=shutil.ignore_patterns("*.npz"))
    arguments = [f"--config_file={ROOT / 'demo' / 'lora.toml'}", f"--train_data_dir={dataset}", f"--seed={seed}"]
    arguments += [f"--output_dir={folder / 'lora'}", f"--max_train_steps={steps}"]
    if sdxl_train_network.main(arguments):
        raise SystemExit("training failed")
    network = ["--network_module=networks.lora", f"--network_weights={folder / 'lora' / 'zxq.safetensors'}"]
    return drawn_share(folder / "before"), drawn_share(folder / "after", *network)


def main() -> None:
    """Print the shares of every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=500, help="training steps (default 500)")
    arguments = parser.parse_args()
    from benchmarks._machine import machine_class

    print(f"{arguments.steps} steps on {machine_class()}")
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            before, after = before_and_after(Path(folder), seed=seed, steps=arguments.steps)
        print(f"seed {seed}: before {before:.4f}, after {after:.4f}", flush=True)


if __name__ == "__main__":
    main()
