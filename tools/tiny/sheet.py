"""Pictures to look at, and the demo's data set of the new concept."""

from pathlib import Path

import cv2
import numpy as np

from tools.tiny import world


def write_png(path: Path, rgb: np.ndarray) -> None:
    """Write uint8 HxWx3 RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = cv2.imencode(".png", rgb[..., ::-1])
    assert done
    path.write_bytes(data.tobytes())


def grid(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size side by side, row after row."""
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    return np.concatenate(rows, axis=0)


def world_sheet(path: Path, *, seed: int) -> None:
    """48 training pictures on one sheet, their captions beside it."""
    rng = np.random.default_rng([seed, 50])
    drawn = [world.draw(rng) for _ in range(48)]
    write_png(path, grid([rgb for rgb, _, _ in drawn], 8))
    path.with_suffix(".txt").write_text("".join(f"{caption} {ids}\n" for _, caption, ids in drawn))


def caption_sheet(models, path: Path, *, count: int = 16) -> None:
    """What the model makes of fresh captions, which stand beside it in a text file."""
    from tools.tiny import arch, scorer
    from tools.tiny.sample import sample

    captions = [answer.caption for answer in scorer.prompts(4711, count)]
    pictures = sample(models, arch.load_tokenizer(), captions, num_steps=12, seed=1)
    write_png(path, grid(list(pictures), 4))
    path.with_suffix(".txt").write_text("".join(caption + "\n" for caption in captions))


def write_concept(folder: Path, *, seed: int, count: int = 16) -> None:
    """The demo's data set: `count` pictures of the new concept with their captions."""
    rng = np.random.default_rng([seed, 60])
    for index in range(count):
        background = world.CONCEPT_BACKGROUNDS[index % len(world.CONCEPT_BACKGROUNDS)]
        name = folder / f"{world.CONCEPT_WORD}_{index:02d}"
        write_png(name.with_suffix(".png"), world.draw_concept(rng, background))
        name.with_suffix(".txt").write_text(world.concept_caption(background) + "\n")
