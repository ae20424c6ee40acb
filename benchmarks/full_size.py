"""SDXL at its real size, with random weights: does the whole job fit, and how long does it take?

    python benchmarks/full_size.py [--work_dir DIR] [--keep]

Writes a bf16 single file of the full architecture (7 GB of disk) with random weights, then runs the real scripts on one
256-pixel picture: cache its latents, one LoRA training step, generate one picture in one step. Prints seconds and peak
memory of each process. Nothing is learnt or drawn; the point is size.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from torch import Tensor

STANDARD_DEVIATION = 0.02


def write_checkpoint(path: Path) -> int:
    """Write the random checkpoint; returns its number of tensors. Every tensor is a piece of one random buffer."""
    import torch

    from library.io.safetensors_file import save
    from library.models.arch import PARTS, PREFIXES, SDXL
    from library.models.assemble import empty_module, part_keymap, stored_shapes

    shapes = {}
    for part in PARTS:
        found = stored_shapes(empty_module(SDXL, part), part_keymap(SDXL, part))
        shapes |= {PREFIXES[part] + name: shape for name, shape in found.items()}
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    buffer = torch.randn(largest, generator=torch.Generator().manual_seed(0)).mul_(STANDARD_DEVIATION).bfloat16()

    class Pieces(Mapping):
        def __getitem__(self, name: str) -> Tensor:
            count = torch.Size(shapes[name]).numel()
            return buffer[:count].view(shapes[name])

        def __iter__(self) -> Iterator[str]:
            return iter(shapes)

        def __len__(self) -> int:
            return len(shapes)

    save(Pieces(), path, {"comment": "random weights"})
    return len(shapes)


def measured(what: str, command: list[str]) -> None:
    """Run a script to its end and print its wall time and peak resident memory."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{what} failed: {' '.join(command)}")
    print(f"{what}: {time.perf_counter() - begin:.1f} s, peak memory {usage.ru_maxrss / 2**20:.2f} GiB", flush=True)


def main() -> None:
    """Write, cache, train, generate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, help="folder for the 7 GB checkpoint (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    arguments = parser.parse_args()
    import numpy as np
    from PIL import Image

    work = arguments.work_dir or Path(tempfile.mkdtemp(prefix="sdxl_full_size_"))
    images = work / "images" / "1_thing"
    images.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(images / "a.png")
    (images / "a.txt").write_text("a picture of a thing")
    checkpoint = work / "full.safetensors"
    begin = time.perf_counter()
    count = write_checkpoint(checkpoint)
    size = checkpoint.stat().st_size / 2**30
    print(f"checkpoint: {count} tensors, {size:.2f} GiB, {time.perf_counter() - begin:.1f} s", flush=True)
    data = [f"--pretrained_model_name_or_path={checkpoint}", f"--train_data_dir={images.parent}", "--resolution=256"]
    data += ["--caption_extension=.txt", "--mixed_precision=bf16"]
    out = work / "out"
    measured("cache latents", ["tools/cache_latents.py", *data, "--cache_latents_to_disk"])
    train = ["--network_module=networks.lora", "--network_dim=4", "--max_train_steps=1", "--gradient_checkpointing"]
    train += [
        "--cache_latents_to_disk",
        f"--output_dir={out}",
        "--output_name=net",
        "--save_precision=bf16",
        "--seed=1",
    ]
    measured("one LoRA step", ["sdxl_train_network.py", *data, *train])
    draw = [f"--ckpt={checkpoint}", "--bf16", "--W=256", "--H=256", "--steps=1", "--prompt=a thing", f"--outdir={out}"]
    draw += ["--network_module=networks.lora", f"--network_weights={out / 'net.safetensors'}", "--seed=1"]
    measured("generate one step", ["sdxl_gen_img.py", *draw])
    if not arguments.keep:
        checkpoint.unlink()
        for folder in (images.parent, out, *(() if arguments.work_dir else (work,))):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
