"""Do new tokens learn? A colour outside the tiny model's palette, and the demo's concept beside a LoRA.

    python benchmarks/textual_inversion.py [--seeds 1 2 3] [--steps 240] [--what colour|pivotal]

colour: 12 pictures of figures in one colour that the model was never shown, "a zxq circle on a white background" and so
on, teach the token zxq alone. Then figures are drawn, of the shapes in the pictures and of shapes that are not, and
the distance of their colour to the taught one (Euclidean, in RGB levels of 255) is compared with that of the same
prompts with the word the token began as, which is what the token drew before its first step.
pivotal: the demo's LoRA learns its concept from captions that name it by a word, which means nothing (the tiny model
knows none of its pieces); with the token of that word trained beside it, and without. The share of the concept's
colours in the pictures is given, as in learning.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TEAL = (0, 130, 120)
SHOWN = ("circle", "square", "star", "heart", "triangle", "ring")
HIDDEN = ("cross", "diamond")
GROUNDS = ("white", "yellow", "pink")
TOKEN, START = "zxq", "green"
SETS = {"shown": SHOWN, "hidden": HIDDEN}
TIMES = {"shown": 1, "hidden": 3}  # so that both are 18 pictures
# The colour of a figure is decided at high noise; what is seen at low noise is mostly noise to a token.
FOR_COLOURS = ["--min_timestep=300", "--min_snr_gamma=1", "--lr_scheduler=cosine"]
TINY = [
    "--pretrained_model_name_or_path=tiny", "--caption_extension=.txt", "--resolution=128,128", "--train_batch_size=4",
    "--cache_latents", "--max_data_loader_n_workers=0",
]  # fmt: skip


def draw_pictures(folder: Path) -> None:
    """Twelve pictures of teal figures with captions, a DreamBooth folder in `folder`."""
    import numpy as np
    from PIL import Image

    from tools.tiny import world

    inner = folder / "10_figures"
    inner.mkdir(parents=True)
    rng = np.random.default_rng(5)
    for index, shape in enumerate(SHOWN):
        for ground in (each for each in GROUNDS if each != GROUNDS[index % len(GROUNDS)]):
            scene = world.place(rng, world.Scene("green", shape, ground), 128, 128)
            picture = np.broadcast_to(np.asarray(world.PALETTE[ground], np.float32), (128, 128, 3))
            picture = world.compose(world.figure_mask(scene), np.asarray(TEAL), picture)
            Image.fromarray(picture.round().astype(np.uint8)).save(inner / f"{shape}_{ground}.png")
            (inner / f"{shape}_{ground}.txt").write_text(caption(TOKEN, shape, ground), encoding="utf-8")


def caption(word: str, shape: str, ground: str) -> str:
    """How a figure is asked for."""
    return f"a {word} {shape} on a {ground} background"


def colour_distance(rgb, target) -> float:
    """Distance, 0..441, of the figure's median colour to `target`; that of the background where no figure stands out.

    rgb: uint8 HxWx3.
    """
    import cv2
    import numpy as np

    from tools.tiny.scorer import _figure

    frame = np.concatenate([side.reshape(-1, 3) for side in (rgb[:4], rgb[-4:], rgb[:, :4], rgb[:, -4:])])
    ground = np.median(frame, axis=0)
    mask = _figure(rgb, ground)
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    shown = rgb[inner if inner.sum() > 20 else mask] if mask.sum() else ground[None]
    return float(np.linalg.norm(np.median(shown, axis=0) - np.asarray(target)))


def drawn_distance(folder: Path, word: str, shapes, times: int, *flags: str) -> float:
    """Draw figures of `shapes` as `word` says into `folder`; the mean distance of their colours to the taught one."""
    import numpy as np
    from PIL import Image

    import sdxl_gen_img

    folder.mkdir(parents=True)
    prompts = [caption(word, shape, ground) for shape in shapes for ground in GROUNDS] * times
    file = folder / "prompts.txt"
    file.write_text("".join(f"{text} --d {seed}\n" for seed, text in enumerate(prompts)), encoding="utf-8")
    arguments = ["--ckpt=tiny", f"--from_file={file}", f"--outdir={folder}", "--steps=10", "--scale=3"]
    if sdxl_gen_img.main([*arguments, "--sampler=euler_a", f"--batch_size={len(prompts)}", *flags]):
        raise SystemExit("generation failed")
    found = [colour_distance(np.asarray(Image.open(path).convert("RGB")), TEAL) for path in folder.glob("*.png")]
    assert len(found) == len(prompts)
    return float(np.mean(found))


def colour(
    folder: Path, *, seed: int, steps: int = 240, rate: float = 0.01, times=TIMES
) -> dict[str, tuple[float, float]]:
    """Distances (before, after) of a token trained with `seed`, for each of SETS that is drawn a number of `times`."""
    import sdxl_train_textual_inversion

    draw_pictures(folder / "set")
    arguments = [f"--train_data_dir={folder / 'set'}", f"--seed={seed}", f"--output_dir={folder / 'out'}"]
    arguments += [f"--token_string={TOKEN}", f"--init_word={START}", f"--max_train_steps={steps}"]
    if sdxl_train_textual_inversion.main([*TINY, *FOR_COLOURS, *arguments, f"--learning_rate={rate}"]):
        raise SystemExit("training failed")
    embedding = f"--textual_inversion_embeddings={folder / 'out' / f'{TOKEN}.safetensors'}"
    return {
        name: (
            drawn_distance(folder / f"{name}_before", START, SETS[name], count),
            drawn_distance(folder / f"{name}_after", TOKEN, SETS[name], count, embedding),
        )
        for name, count in times.items()
    }


def pivotal(folder: Path, *, seed: int, steps: int = 100, rate: float = 0.01) -> tuple[float, float]:
    """Shares of the concept's colours: a LoRA alone, and one with a token beside it, after the same steps."""
    import shutil

    import sdxl_train_network
    from benchmarks.learning import drawn_share

    dataset = folder / "dataset"
    shutil.copytree(ROOT / "demo" / "dataset", dataset, ignore=shutil.ignore_patterns("*.npz"))
    common = [*TINY, f"--train_data_dir={dataset}", f"--seed={seed}", f"--max_train_steps={steps}"]
    common += ["--network_module=networks.lora", "--network_dim=8", "--network_alpha=8", "--learning_rate=2e-3"]
    common += ["--network_args", "conv_dim=8", "conv_alpha=8", "--network_train_unet_only"]
    common += ["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=20"]
    tokens = ["--train_tokens", f"--token_string={TOKEN}", f"--token_lr={rate}", "--bundle_tokens"]
    shares = []
    for name, extra in (("alone", []), ("tokens", tokens)):
        out = folder / name
        if sdxl_train_network.main([*common, f"--output_dir={out}", "--output_name=net", *extra]):
            raise SystemExit("training failed")
        drawn = ["--network_module=networks.lora", f"--network_weights={out / 'net.safetensors'}"]
        shares.append(drawn_share(folder / f"{name}_pictures", *drawn))
    return shares[0], shares[1]


def main() -> None:
    """Print the figures of every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="training steps (default: 240 for the colour, 100 beside a LoRA)")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate of the token (default 0.01)")
    parser.add_argument("--what", choices=["colour", "pivotal"], default="colour")
    arguments = parser.parse_args()
    from benchmarks._machine import machine_class

    steps = arguments.steps or (240 if arguments.what == "colour" else 100)
    print(f"{arguments.what}, {steps} steps, token's rate {arguments.rate} on {machine_class()}")
    for seed in arguments.seeds:
        start, computing = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            run = colour if arguments.what == "colour" else pivotal
            found = run(Path(folder), seed=seed, steps=steps, rate=arguments.rate)
        if isinstance(found, dict):
            text = ", ".join(f"{name} shapes {before:.1f} -> {after:.1f}" for name, (before, after) in found.items())
        else:
            text = f"LoRA alone {found[0]:.4f}, with tokens {found[1]:.4f}"
        times = f"{time.perf_counter() - start:.0f} s, computing {time.process_time() - computing:.0f} s"
        print(f"seed {seed}: {text} ({times})", flush=True)


if __name__ == "__main__":
    main()
