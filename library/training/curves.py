"""The curves of a run as one picture, drawn from its JSONL log."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from library.io.atomic import atomic_path
from library.training.bands import NAMES as BANDS

MIN_STEPS = 20  # fewer points are no curve
MAX_POINTS = 1500  # more than the picture has pixels
_DARK, _LIGHT, _WARN = "#1f4e79", "#b9cfe4", "#c0392b"

# Steps and values of one number, as float64 arrays of one length.
Series = tuple[np.ndarray, np.ndarray]


def draw_curves(jsonl: Path, picture: Path) -> bool:
    """Draw `jsonl` into `picture` (PNG); False, and no picture, for a run of fewer than MIN_STEPS steps.

    Panels are left out when the log has no numbers for them. Raises OSError and what matplotlib raises.
    """
    series = read_series(jsonl)
    if "loss" not in series or len(series["loss"][0]) < MIN_STEPS:
        return False
    panels = [(title, draw) for title, draw in _PANELS if any(_belongs(title, name) for name in series)]
    rows = -(-len(panels) // 2)
    # A figure of its own instead of pyplot's: that one keeps global state and may want a display.
    figure = Figure(figsize=(12, 3.1 * rows + 0.5), dpi=100, layout="constrained")
    figure.suptitle(picture.stem.removesuffix("-curves"), fontsize=12, fontweight="bold")
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes, (title, draw) in zip(grid.flat, panels):
        _prepare(axes, title)
        draw(axes, series)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    with atomic_path(picture, durable=False) as temporary:
        figure.savefig(temporary, format="png")
    return True


def read_series(jsonl: Path) -> dict[str, Series]:
    """Every number of the log by name; a torn last line is left out, and so is what is no number."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    for line in jsonl.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        for name, value in _numbers(record).items():
            steps, values = points.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(value)
    return {name: (np.array(steps, float), np.array(values, float)) for name, (steps, values) in points.items()}


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}


def thinned(series: Series, points: int = MAX_POINTS) -> Series:
    """Means over equal stretches, so that at most `points` are left; what is not finite is left out of the means."""
    steps, _ = series
    width = math.ceil(len(steps) / points)
    if width <= 1:
        return series
    length = -(-len(steps) // width) * width
    padded = [np.concatenate([each, np.full(length - len(each), np.nan)]).reshape(-1, width) for each in series]
    known = np.isfinite(padded[1])
    with np.errstate(invalid="ignore"):
        means = np.where(known, padded[1], 0.0).sum(axis=1) / known.sum(axis=1)
    return np.nanmean(padded[0], axis=1), means


def _prepare(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _line(axes: Axes, series: Series, **style: Any) -> None:
    """A line, with dots where there are too few points to see one."""
    steps, values = thinned(series)
    dots = {"marker": "o", "markersize": 2.5} if len(steps) < 60 and style.get("linewidth", 1.4) > 1 else {}
    axes.plot(steps, values, **{"linewidth": 1.4, **dots, **style})


def _legend(axes: Axes, **place: Any) -> None:
    axes.legend(fontsize=7, frameon=False, **{"loc": "best", **place})


def _loss(axes: Axes, series: Mapping[str, Series]) -> None:
    _line(axes, series["loss"], color=_LIGHT, linewidth=0.9, label="each step")
    if "loss_average" in series:
        _line(axes, series["loss_average"], color=_DARK, marker="", label="running mean")
    _without_outliers(axes, series["loss"][1])
    _legend(axes)


def _without_outliers(axes: Axes, values: np.ndarray) -> None:
    """Limit the height to what nearly all values need: one spike must not flatten the curve."""
    finite = values[np.isfinite(values)]
    if len(finite):
        top = np.quantile(finite, 0.99)
        if finite.max() > 3 * top > 0:
            axes.set_ylim(0, 1.3 * top)


def _bands(axes: Axes, series: Mapping[str, Series]) -> None:
    colours = matplotlib.colormaps["viridis"]
    for index, name in enumerate(BANDS):
        if name in series:
            _line(axes, series[name], color=colours(index / len(BANDS)), label=name.partition("/")[2], linewidth=1.1)
    _legend(axes, ncols=2, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="timesteps", title_fontsize=7)


def _norm(axes: Axes, series: Mapping[str, Series]) -> None:
    steps, values = series["grad_norm"]
    _line(axes, (steps, np.where(np.isfinite(values) & (values > 0), values, np.nan)), color=_DARK, linewidth=1.0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if "skipped" in series:
        at, skipped = series["skipped"]
        for step in at[skipped > 0]:
            axes.axvline(step, color=_WARN, linewidth=0.8, alpha=0.6)
        if (skipped > 0).any():
            axes.set_title(f"red: {int((skipped > 0).sum())} skipped", fontsize=8, loc="right", color=_WARN)


def _rates(axes: Axes, series: Mapping[str, Series]) -> None:
    equal: dict[bytes, list[str]] = {}
    for name in sorted(name for name in series if name.startswith("lr/")):
        equal.setdefault(series[name][1].tobytes(), []).append(name)
    for names in equal.values():
        shown = [name.removeprefix("lr/") for name in names]
        label = ", ".join(shown) if len(shown) <= 3 else f"{shown[0]} and {len(shown) - 1} more"
        _line(axes, series[names[0]], label=label, marker="")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.set_ylim(bottom=0)
    _legend(axes, ncols=1 if len(equal) < 6 else 2)


def _speed(axes: Axes, series: Mapping[str, Series]) -> None:
    _line(axes, series["images_per_second"], color=_DARK, marker="")
    axes.set_ylim(0, 1.15 * max(series["images_per_second"][1].max(), 1e-3))
    if "data_wait" in series:
        share = axes.twinx()
        _line(share, series["data_wait"], color=_WARN, linewidth=1.0, marker="")
        share.set_ylim(0, 1)
        share.spines["top"].set_visible(False)
        share.tick_params(labelsize=8, colors=_WARN)
        share.set_ylabel("share of time waiting for data", fontsize=8, color=_WARN)


def _memory(axes: Axes, series: Mapping[str, Series]) -> None:
    _line(axes, series["peak_memory_gib"], color=_DARK, marker="")
    axes.set_ylim(0, 1.15 * series["peak_memory_gib"][1].max())


def _validation(axes: Axes, series: Mapping[str, Series]) -> None:
    for name in sorted(name for name in series if "validation/" in name):
        label = name.partition("validation/")[2]
        if "/" not in label and label != "gap":
            _line(axes, series[name], label=label.replace("_", " "))
    _legend(axes)


def _validation_bands(axes: Axes, series: Mapping[str, Series]) -> None:
    colours = matplotlib.colormaps["viridis"]
    names = sorted(name for name in series if "/held_out/" in name)
    for index, name in enumerate(names):
        _line(axes, series[name], color=colours(index / len(names)), label=name.rpartition("/")[2].lstrip("t"))
    _legend(axes, ncols=2, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="timesteps", title_fontsize=7)


_PANELS: tuple[tuple[str, Callable[[Axes, Mapping[str, Series]], None]], ...] = (
    ("loss", _loss),
    ("loss by timestep", _bands),
    ("validation loss", _validation),
    ("validation loss by timestep, images held out", _validation_bands),
    ("gradient norm before clipping", _norm),
    ("learning rate", _rates),
    ("images per second", _speed),
    ("peak memory, GiB", _memory),
)
_NEEDS = {
    "loss": "loss",
    "loss by timestep": "loss_band/",
    "validation loss": "validation/",
    "validation loss by timestep, images held out": "/held_out/",
    "gradient norm before clipping": "grad_norm",
    "learning rate": "lr/",
    "images per second": "images_per_second",
    "peak memory, GiB": "peak_memory_gib",
}


def _belongs(title: str, name: str) -> bool:
    needed = _NEEDS[title]
    return needed in name if needed.endswith("/") else name == needed
