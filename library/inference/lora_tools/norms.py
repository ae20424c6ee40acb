"""What a LoRA file holds: the norm of every module's change, by block, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from library.config.block_weights import u_net_block
from library.data.progress import progress_bar
from library.errors import UserError
from library.inference.lora_tools.files import LoraFile
from library.inference.lora_tools.names import part_of, sd_scripts_name
from library.inference.lora_tools.report import part_title
from library.io.atomic import atomic_path
from library.log import get_logger

log = get_logger(__name__)

_KINDS = ("attn1", "attn2", "ff", "proj", "conv", "other")
_CONV_MARKS = ("in_layers", "out_layers", "emb_layers", "skip_connection", "_op", "_conv")
_TEXT_ORDER = {"te": 0, "te1": 0, "te2": 1}


@dataclass(frozen=True)
class ModuleNorm:
    """One module: its block and kind, rank, alpha, number of weights, Frobenius norm of its change, and what is wrong.

    norm is that of alpha / rank * up @ down, NaN where a factor is not finite; `fault` is "", "NaN or infinity",
    "zero" (up and down: it changes nothing) or "untrained" (up is zero and down is not).
    """

    name: str
    part: str
    block: str
    order: tuple[int, int]
    kind: str
    rank: int
    alpha: float
    num_weights: int
    norm: float
    fault: str

    @property
    def rms(self) -> float:
        """Root mean square of the change of one weight: comparable between modules of different sizes."""
        return self.norm / math.sqrt(self.num_weights)


def module_norms(path: str) -> list[ModuleNorm]:
    """All modules of a file in the order of the model. Raises UserError for what is no LoRA."""
    found = []
    with ExitStack() as stack:
        file = LoraFile(path, stack)
        with progress_bar(len(file.modules), title="read", unit="module", delay=2.0) as bar:
            for module in file.modules.values():
                up, down = (file.source[key].float().flatten(1) for key in (module.up_key, module.down_key))
                # |up @ down|^2 = tr(up^T up down down^T), without the product; float64 because it is a sum of squares.
                square = ((up.T @ up).double() * (down @ down.T).double()).sum()
                fault = ""
                if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
                    fault = "NaN or infinity"
                elif not up.any():
                    fault = "untrained" if down.any() else "zero"
                elif not down.any():
                    fault = "zero"
                name = sd_scripts_name(module.name)
                block, order = _block(name)
                norm = math.nan if fault.startswith("NaN") else module.scale * math.sqrt(max(float(square), 0.0))
                found.append(
                    ModuleNorm(
                        name=module.name,
                        part=part_of(name),
                        block=block,
                        order=order,
                        kind=_kind(name),
                        rank=module.rank,
                        alpha=module.alpha,
                        num_weights=math.prod(module.shape),
                        norm=abs(norm),
                        fault=fault,
                    )
                )
                bar.update()
    return sorted(found, key=lambda one: one.order)


def _block(name: str) -> tuple[str, tuple[int, int]]:
    """(label, place in the model) of a module's block: a text encoder's layer, or one of the U-Net's 23 blocks."""
    part = part_of(name)
    if part in _TEXT_ORDER:
        pieces = name.split("_")
        layer = next((int(p) for before, p in pairwise(pieces) if before == "layers" and p.isdigit()), 99)
        return f"{part} layer {layer}", (_TEXT_ORDER[part], layer)
    try:
        index = u_net_block(name.partition("_unet_")[2])
    except KeyError:
        return part, (3, 0)
    if index == 0:
        return "time", (2, 0)
    starts = ((22, "out"), (13, "OUT"), (10, "MID"), (1, "IN"))
    start, label = next((start, label) for start, label in starts if index >= start)
    return (label if label == "out" else f"{label}{index - start:02d}"), (2, index)


def _kind(name: str) -> str:
    for kind in ("attn1", "attn2"):
        if f"_{kind}_" in name:
            return kind
    if "_self_attn_" in name:
        return "attn1"
    if "_ff_" in name or "_mlp_" in name:
        return "ff"
    if name.endswith(("_proj_in", "_proj_out")):
        return "proj"
    return "conv" if any(mark in name for mark in _CONV_MARKS) else "other"


def blocks_of(norms: Sequence[ModuleNorm]) -> dict[str, list[ModuleNorm]]:
    """Modules by block, in the order of the model."""
    found: dict[str, list[ModuleNorm]] = {}
    for one in norms:
        found.setdefault(one.block, []).append(one)
    return found


def table(norms: Sequence[ModuleNorm]) -> Iterator[str]:
    """A line for each block, then the sums of the parts, then everything that is wrong."""
    yield f"{'block':<16}{'modules':>8}{'rank':>10}{'norm':>12}{'largest':>12}{'rms/weight':>12}"
    for block, modules in blocks_of(norms).items():
        yield _row(block, modules)
    yield ""
    for part in dict.fromkeys(one.part for one in norms):
        yield _row(part_title(part), [one for one in norms if one.part == part])
    for fault in ("NaN or infinity", "zero", "untrained"):
        names = [one.name for one in norms if one.fault == fault]
        if names:
            yield f"{fault}: {len(names)} of {len(norms)} modules: {', '.join(names[:5])}" + (
                f" and {len(names) - 5} more" if len(names) > 5 else ""
            )


def _row(label: str, modules: Sequence[ModuleNorm]) -> str:
    ranks = sorted({one.rank for one in modules})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    total = math.sqrt(sum(one.norm**2 for one in modules))
    largest = math.nan if math.isnan(total) else max(one.norm for one in modules)
    rms = total / math.sqrt(sum(one.num_weights for one in modules))
    return f"{label:<16}{len(modules):>8}{rank:>10}{total:>12.4g}{largest:>12.4g}{rms:>12.3e}"


def tensor_lines(path: str) -> Iterator[str]:
    """A line for every tensor: name, shape, mean and smallest absolute value."""
    with ExitStack() as stack:
        file = LoraFile(path, stack)
        for key in file.source:
            values = file.source[key].float().abs()
            shape = tuple(file.source[key].shape)
            yield f"{key} {shape} mean |w| {float(values.mean()):.6g} min |w| {float(values.min()):.6g}"


def draw(norms: Sequence[ModuleNorm], picture: str, *, title: str) -> None:
    """The rms change of a weight by block (bars) and by block and kind of module (colours), as a PNG file."""
    from matplotlib.figure import Figure

    if not picture.lower().endswith(".png"):
        raise UserError("the picture is a PNG file", picture, "let its name end in .png")
    blocks = blocks_of(norms)
    kinds = [kind for kind in _KINDS if any(one.kind == kind for one in norms)]
    labels = list(blocks)
    # A figure of its own instead of pyplot's: that one keeps global state and may want a display.
    figure = Figure(figsize=(11, max(3.0, 0.23 * len(labels) + 1.6)), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    bars, heat = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    places = np.arange(len(labels))
    values = [_rms(modules) for modules in blocks.values()]
    broken = [any(math.isnan(one.norm) for one in modules) for modules in blocks.values()]
    bars.barh(places, values, color="#1f4e79", height=0.75)
    for place in places[np.array(broken)]:
        bars.text(0, place, " NaN", color="#c0392b", va="center", fontsize=8, fontweight="bold")
    bars.set_yticks(places, labels, fontsize=8)
    bars.set_ylim(len(labels) - 0.5, -0.5)
    bars.set_xlabel("rms change of a weight")
    bars.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
    bars.grid(axis="x", color="#dddddd")
    bars.set_axisbelow(True)
    grid = np.array(
        [[_rms([one for one in modules if one.kind == kind]) for kind in kinds] for modules in blocks.values()]
    )
    shown = heat.imshow(grid, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    heat.set_xticks(range(len(kinds)), kinds, fontsize=8)
    heat.tick_params(axis="y", labelleft=False)
    heat.set_facecolor("#f0f0f0")
    figure.colorbar(shown, ax=heat, label="rms change of a weight", format="%.1e")
    with atomic_path(picture, durable=False) as temporary:
        figure.savefig(temporary, format="png")
    log.info("written: %s", Path(picture))


def _rms(modules: Sequence[ModuleNorm]) -> float:
    """Over all weights of the modules whose values are finite; NaN when there are none."""
    sound = [one for one in modules if not math.isnan(one.norm)]
    if not sound:
        return math.nan
    return math.sqrt(sum(one.norm**2 for one in sound) / sum(one.num_weights for one in sound))
