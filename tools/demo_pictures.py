"""Draw what the demo learnt: a grid of training pictures, before and after, and the curve of the loss.

    python tools/demo_pictures.py

Reads demo/dataset, demo/prompts.txt and demo/out; writes demo/before_after.png and demo/loss_curve.png, and prints how
much of each picture has the concept's colour.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

CELL = 128  # pixels, the size at which the tiny model draws
MARGIN = 112  # pixels on the left, for the rows' names
HEADER = 44  # pixels at the top, for the prompts
ROWS = ("training picture", "before", "after")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a prompt file, without their options."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line.split(" --")[0] for line in lines if line and not line.startswith("#")]


def examples(dataset: Path) -> dict[str, list[Path]]:
    """Caption -> the training pictures that have it, in the order of their names."""
    found: dict[str, list[Path]] = {}
    for caption in sorted(dataset.rglob("*.txt")):
        found.setdefault(caption.read_text(encoding="utf-8").strip(), []).append(caption.with_suffix(".png"))
    return found


def pictures(folder: Path, count: int) -> list[Path]:
    """The `count` pictures that the generator wrote into a folder, in the order of the prompts."""
    found = sorted(folder.glob("*.png"))
    if len(found) != count:
        raise SystemExit(f"{folder} holds {len(found)} pictures, {count} prompts were asked for: run the demo again")
    return found


def draw_grid(prompts: Sequence[str], rows: Sequence[Sequence[Path | None]], path: Path) -> None:
    """One column per prompt, one row per entry of ROWS; None leaves a cell empty with a word why."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", (MARGIN + CELL * len(prompts), HEADER + CELL * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for column, prompt in enumerate(prompts):
        text = "\n".join(textwrap.wrap(prompt, 18))
        pen.multiline_text((MARGIN + CELL * column + CELL // 2, HEADER // 2), text, "black", font, "mm", align="center")
    for row, (name, cells) in enumerate(zip(ROWS, rows, strict=True)):
        top = HEADER + CELL * row
        pen.text((MARGIN - 8, top + CELL // 2), name, "black", font, "rm")
        for column, cell in enumerate(cells):
            left = MARGIN + CELL * column
            if cell is None:
                pen.text((left + CELL // 2, top + CELL // 2), "none", "grey", font, "mm")
            else:
                sheet.paste(_square(cell), (left, top))
    sheet.save(path)


def _square(path: Path) -> Image.Image:
    """A picture as a cell of the grid, with a thin white frame."""
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        return ImageOps.expand(ImageOps.fit(picture.convert("RGB"), (CELL - 4, CELL - 4)), 2, "white")


def draw_loss(log: Path, path: Path) -> None:
    """The loss of every step, and its moving mean over a tenth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = np.array([record["step"] for record in records])
    loss = np.array([record["loss"] for record in records], np.float64)
    window = max(1, len(loss) // 10)
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(steps, loss, color="0.75", linewidth=0.8, label="loss of a step")
    axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of the last {window} steps")
    axes.set(xlabel="optimizer step", ylabel="loss", xlim=(0, steps[-1]), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def mean_share(paths: Sequence[Path]) -> float:
    """Mean share, 0..1, of the pixels that have one of the concept's two colours."""
    import numpy as np
    from PIL import Image

    from tools.tiny.scorer import concept_share

    shares = []
    for path in paths:
        with Image.open(path) as picture:
            shares.append(sum(concept_share(np.asarray(picture.convert("RGB")))))
    return sum(shares) / len(shares)


def report(learnt: dict[str, list[Path]], prompts: Sequence[str], before: list[Path], after: list[Path]) -> str:
    """How much of the pictures is the concept's colour, for backgrounds in the data and for others."""
    lines = ["share of the picture that has the concept's colours, mean", f"{'':26} data    before  after"]
    for name, wanted in (("training backgrounds", True), ("new backgrounds", False)):
        columns = [index for index, prompt in enumerate(prompts) if (prompt in learnt) == wanted]
        if not columns:
            continue
        data = [picture for index in columns for picture in learnt.get(prompts[index], [])]
        values = [f"{mean_share(data):.3f}" if data else "-"]
        values += [f"{mean_share([row[index] for index in columns]):.3f}" for row in (before, after)]
        lines.append(f"  {name:24} {values[0]:7} {values[1]:7} {values[2]}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Draw both pictures from what the demo left, and print the report."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--demo_dir", type=Path, default=ROOT / "demo", help="folder of the demo")
    demo: Path = parser.parse_args(argv).demo_dir
    prompts = read_prompts(demo / "prompts.txt")
    learnt = examples(demo / "dataset")
    before, after = (pictures(demo / "out" / name, len(prompts)) for name in ("before", "after"))
    grid, curve = demo / "before_after.png", demo / "loss_curve.png"
    draw_grid(prompts, [[learnt.get(prompt, [None])[0] for prompt in prompts], before, after], grid)
    draw_loss(demo / "out" / "lora" / "zxq-log.jsonl", curve)
    print(report(learnt, prompts, before, after))
    print(f"before and after: {grid}\nloss curve:       {curve}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
