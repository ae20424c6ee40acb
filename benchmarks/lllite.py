"""Does a ControlNet-LLLite learn to be followed? How well figures cover those of control images, before and after.

    python benchmarks/lllite.py [--seeds 1 2 3] [--steps 250]

Trains on pictures of the tiny world whose figures lie anywhere and have any size, with their soft edges; then draws
held-out scenes through the real scripts, with and without the result. The score is the overlap (intersection over
union) of the drawn figure with the control image's, mean over the pictures. Captions name colours and shape, and
nothing of place and size, so without the network a figure is where the base model likes it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIDE = 128
TRAIN = [
    "--pretrained_model_name_or_path=tiny", "--caption_extension=.txt", f"--resolution={SIDE}", "--train_batch_size=4",
    "--cache_latents", "--cache_text_encoder_outputs", "--max_data_loader_n_workers=0", "--learning_rate=6e-3",
    "--lr_scheduler=cosine", "--lr_warmup_steps=10", "--min_timestep=400", "--cond_emb_dim=64",
]  # fmt: skip


def scenes(seed: int, count: int) -> list[Any]:
    """Scenes of plain figures anywhere on the canvas."""
    from dataclasses import replace

    import numpy as np

    from tools.tiny import world

    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        radius = rng.uniform(0.16, 0.3) * SIDE
        x, y = rng.uniform(1.1 * radius, SIDE - 1.1 * radius, 2)
        scene = world.sample_scene(rng, plain=True)
        found.append(replace(scene, radius=float(radius), centre_x=float(x), centre_y=float(y)))
    return found


def write_pairs(folder: Path, some: list[Any]) -> None:
    """The scenes as pictures with captions in folder/images, their edges in folder/edges."""
    import numpy as np
    from PIL import Image

    from library.data.conditions import make_conditions
    from tools.tiny import world

    rng, images = np.random.default_rng(0), folder / "images"
    images.mkdir(parents=True)
    for number, scene in enumerate(some):
        Image.fromarray(world.render(rng, scene)).save(images / f"{number:03d}.png")
        caption = world.plain_caption(scene.colour, scene.shape, scene.background)
        (images / f"{number:03d}.txt").write_text(caption)
    made = make_conditions(images, folder / "edges", kind="soft")
    assert made.written == len(some), list(made.lines())


def overlap(picture: Any, scene: Any) -> float:
    """Intersection over union of a picture's figure (the pixels nearer to its colour than to the background's) with
    the scene's."""
    import numpy as np

    from tools.tiny import world

    figure, ground = (np.array(world.PALETTE[name], np.float32) for name in (scene.colour, scene.background))
    rgb = np.asarray(picture, np.float32)
    drawn = ((rgb - figure) ** 2).sum(axis=2) < ((rgb - ground) ** 2).sum(axis=2)
    wanted = world.figure_mask(scene) > 0.5
    return float((drawn & wanted).sum() / max((drawn | wanted).sum(), 1))


def drawn_overlap(folder: Path, held_out: Path, some: list[Any], *flags: str) -> float:
    """Draw the held-out scenes' captions into `folder`; the mean overlap."""
    import numpy as np
    from PIL import Image

    import sdxl_gen_img
    from tools.tiny import world

    folder.mkdir(parents=True)
    prompts = folder / "prompts.txt"
    lines = [world.plain_caption(scene.colour, scene.shape, scene.background) for scene in some]
    prompts.write_text("".join(f"{text} --d {number}\n" for number, text in enumerate(lines)))
    arguments = ["--ckpt=tiny", f"--from_file={prompts}", f"--outdir={folder}", "--steps=10", "--scale=3"]
    arguments += ["--sampler=euler_a", "--batch_size=4", "--sequential_file_name", *flags]
    if "--control_net_lllite_models" in " ".join(flags):
        arguments.append(f"--guide_image_path={held_out / 'edges'}")
    if sdxl_gen_img.main(arguments):
        raise SystemExit("generation failed")
    paths = sorted(folder.glob("*.png"))
    return float(np.mean([overlap(Image.open(p).convert("RGB"), s) for p, s in zip(paths, some, strict=True)]))


def before_and_after(
    folder: Path, *, seed: int, steps: int, pictures: int = 100, drawn: int = 16
) -> tuple[float, float]:
    """Overlaps without and with a network that was trained for `steps` with `seed`."""
    import sdxl_train_control_net_lllite

    write_pairs(folder / "train", scenes(seed, pictures))
    held_out = scenes(1000 + seed, drawn)
    write_pairs(folder / "held_out", held_out)
    arguments = [*TRAIN, f"--train_data_dir={folder / 'train' / 'images'}", f"--seed={seed}"]
    arguments += [f"--conditioning_data_dir={folder / 'train' / 'edges'}", f"--max_train_steps={steps}"]
    if sdxl_train_control_net_lllite.main([*arguments, f"--output_dir={folder / 'out'}", "--output_name=edges"]):
        raise SystemExit("training failed")
    network = f"--control_net_lllite_models={folder / 'out' / 'edges.safetensors'}"
    before = drawn_overlap(folder / "before", folder / "held_out", held_out)
    return before, drawn_overlap(folder / "after", folder / "held_out", held_out, network)


def main() -> None:
    """Print the overlaps of every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=250, help="training steps (default 250)")
    arguments = parser.parse_args()
    from benchmarks._machine import machine_class

    print(f"{arguments.steps} steps on {machine_class()}")
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            before, after = before_and_after(Path(folder), seed=seed, steps=arguments.steps)
        print(f"seed {seed}: overlap before {before:.3f}, after {after:.3f}", flush=True)


if __name__ == "__main__":
    main()
