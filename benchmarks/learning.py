"""Does a run learn? The share of the new concept's colours in generated pictures, before and after training.

    python benchmarks/learning.py [--seeds 1 2 3] [--steps 500] [--kind lora|dora|...|full|bf16]

Trains the demo's LoRA (demo/lora.toml), another kind of network in its place, or the whole model (also with
--full_bf16) and draws "a zxq" on the five backgrounds of the training pictures, with and without the result, through
the real scripts. The share is that of magenta and lime pixels, mean over the pictures. Further flags go to the training
script.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROMPTS = [f"a zxq on a {colour} background" for colour in ("white", "black", "blue", "green", "yellow")]

FULL = [
    "--pretrained_model_name_or_path=tiny", "--caption_extension=.txt", "--resolution=128,128", "--train_batch_size=4",
    "--cache_latents", "--cache_text_encoder_outputs", "--max_data_loader_n_workers=0", "--learning_rate=1e-3",
    "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=20",
]  # fmt: skip
BF16 = ["--mixed_precision=bf16", "--full_bf16"]
# What the other kinds of networks need beside the settings of the LoRA.
NETWORKS: dict[str, list[str]] = {
    "lora": [],
    "dora": [],
    "dylora": ["--network_args", "unit=2"],
    "lora_fa": [],
    "oft": ["--network_alpha=1e-2", "--network_args", "enable_all_linear=true"],
}


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


def share_after(folder: Path, *, seed: int, steps: int, kind: str = "lora", more: Sequence[str] = ()) -> float:
    """The share with what was trained for `steps` with `seed`: a network, or the whole model ("full", "bf16").

    more: flags of the training script on top.
    """
    import shutil

    import sdxl_train
    import sdxl_train_network

    dataset = folder / "dataset"
    shutil.copytree(ROOT / "demo" / "dataset", dataset, ignore=shutil.ignore_patterns("*.npz"))
    arguments = [f"--train_data_dir={dataset}", f"--seed={seed}", f"--output_dir={folder / 'out'}"]
    arguments += [f"--max_train_steps={steps}", "--output_name=zxq"]
    if kind in NETWORKS:
        module = f"--network_module=networks.{kind}"
        settings = [f"--config_file={ROOT / 'demo' / 'lora.toml'}", module, *NETWORKS[kind]]
        code = sdxl_train_network.main([*settings, *arguments, *more])
        drawn = [module, f"--network_weights={folder / 'out' / 'zxq.safetensors'}"]
    else:
        code = sdxl_train.main([*FULL, *(BF16 if kind == "bf16" else []), *arguments, *more])
        drawn = [f"--ckpt={folder / 'out' / 'zxq.safetensors'}"]
    if code:
        raise SystemExit("training failed")
    return drawn_share(folder / "after", *drawn)


def main() -> None:
    """Print the shares of every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=500, help="training steps (default 500)")
    parser.add_argument("--kind", choices=[*NETWORKS, "full", "bf16"], default="lora", help="what is trained")
    arguments, more = parser.parse_known_args()
    from benchmarks._machine import machine_class

    print(" ".join([f"{arguments.kind}, {arguments.steps} steps on {machine_class()}", *more]))
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            before = drawn_share(Path(folder, "before"))
            after = share_after(Path(folder), seed=seed, steps=arguments.steps, kind=arguments.kind, more=more)
        print(f"seed {seed}: before {before:.4f}, after {after:.4f}", flush=True)


if __name__ == "__main__":
    main()
