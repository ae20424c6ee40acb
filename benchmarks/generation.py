"""Pictures per minute of the generator and of diffusers' pipeline, on the tiny model or another one.

    python benchmarks/generation.py [--ckpt tiny] [--batch_size 1 8] [--pictures 8] [--repeats 5]

Text encoding, denoising, decoding and turning into pictures, with the same prompts, sampler (Euler), steps, size,
guidance and dtype. The two take turns within one process, so a change of the machine's load hits both; the ratio is
taken within each round. diffusers' pipeline gets the same weights, and its prompts in lists as long as the batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Print pictures per minute of both and the median ratio, for each batch size."""
    from benchmarks._machine import machine_class

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="tiny", help="model, as of sdxl_gen_img.py")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8], help="pictures at once")
    parser.add_argument("--pictures", type=int, default=8, help="pictures of a round")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps")
    parser.add_argument("--size", type=int, default=0, help="side in pixels (0: the model's own)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the model")
    given = parser.parse_args(argv)
    print(f"{given.ckpt}, {given.pictures} pictures of {given.steps} steps, {given.dtype}, {machine_class()}")
    ours, theirs = _makers(given)
    for size in given.batch_size:
        ours(size), theirs(size)
        rounds = [(_seconds(ours, size), _seconds(theirs, size)) for _ in range(given.repeats)]
        ratios = sorted(other / own for own, other in rounds)
        own, other = (60 * given.pictures / statistics.median(column) for column in zip(*rounds, strict=True))
        spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(
            f"batch {size}: {own:7.1f} a minute, diffusers {other:7.1f}: {statistics.median(ratios):.2f} times {spread}"
        )
    return 0


def _makers(given: argparse.Namespace) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Functions of the batch size that draw all pictures of a round."""
    import diffusers
    import torch

    from library.inference.launch import generate
    from library.inference.request import CELL, GenRequest
    from library.models.checkpoint import load_bundle, save_diffusers
    from library.sizes import Size

    dtype, device = getattr(torch, given.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    bundle = load_bundle(given.ckpt, dtype=dtype, device=device)
    side = given.size or bundle.arch.facts.sample_size * CELL
    prompts = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "star", "cross")]
    prompts = [prompts[index % len(prompts)] for index in range(given.pictures)]
    with tempfile.TemporaryDirectory() as folder:
        save_diffusers(bundle, folder)
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def ours(batch_size: int) -> None:
        requests = [
            GenRequest(prompt, "blurry", Size(side, side), given.steps, 5.0, seed, "euler")
            for seed, prompt in enumerate(prompts)
        ]
        assert len(list(generate(bundle, requests, batch_size=batch_size))) == len(prompts)

    def theirs(batch_size: int) -> None:
        drawn = []
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            drawn += pipeline(
                some,
                negative_prompt=["blurry"] * len(some),
                width=side,
                height=side,
                num_inference_steps=given.steps,
                guidance_scale=5.0,
                generator=[torch.Generator().manual_seed(start + index) for index in range(len(some))],
            ).images
        assert len(drawn) == len(prompts)

    return ours, theirs


def _seconds(draw: Callable[[int], None], batch_size: int) -> float:
    start = time.perf_counter()
    draw(batch_size)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
