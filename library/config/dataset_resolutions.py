"""The resolutions of a dataset: one, or several with weights, wherever they are given."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from library.config.dataset_keys import Place
from library.config.run_config import RunConfig
from library.errors import Problem
from library.sizes import Size

BOTH = "resolution and resolutions are both given"
KEYS = ("resolution", "resolutions", "resolution_weights")


class Resolutions(NamedTuple):
    """Sizes and weights as given; no sizes when there are none."""

    sizes: tuple[Size, ...]
    weights: tuple[float, ...]


def look_up_resolutions(cfg: RunConfig, places: list[Place], *, where: str) -> tuple[Resolutions, list[Problem]]:
    """The resolutions of a dataset whose values stand in `places` (nearest first) or among the run's options.

    `resolution` and `resolutions` are two spellings of one setting: the nearest place that has one of them counts.
    Weights count when they stand there or nearer.
    """
    levels: list[tuple[dict[str, Any], str]] = [(place.values, place.where("resolutions")) for place in places]
    levels.append(({key: cfg.get(key) for key in KEYS}, "the options of the run"))
    weights: tuple[float, ...] = ()
    for values, here in levels:
        weights = weights or values.get("resolution_weights") or ()
        one: Size | None = values.get("resolution")
        several: tuple[Size, ...] = values.get("resolutions") or ()
        if one and several:
            return Resolutions((), ()), [Problem(BOTH, here, "remove one of them")]
        sizes = (one,) if one else several
        if sizes:
            found = Resolutions(sizes, weights)
            return found, _problems(found, where)
    return Resolutions((), ()), []


def _problems(found: Resolutions, where: str) -> list[Problem]:
    problems = []
    twice = [str(size) for size, count in Counter(found.sizes).items() if count > 1]
    if twice:
        fix = "name it once; resolution_weights says how often it is used"
        problems.append(Problem(f"resolutions has {', '.join(twice)} more than once", where, fix))
    if found.weights and len(found.sizes) == 1:
        fix = "remove resolution_weights, or name several in resolutions"
        problems.append(Problem("resolution_weights cannot act on a single resolution", where, fix))
    elif found.weights and len(found.weights) != len(found.sizes):
        what = f"resolution_weights has {len(found.weights)} numbers for {len(found.sizes)} resolutions"
        problems.append(Problem(what, where, "give one number for each resolution"))
    if any(weight <= 0 for weight in found.weights):
        what = f"resolution_weights has {min(found.weights):g}, which is not above 0"
        problems.append(Problem(what, where, "leave out the resolution that is not to be used"))
    return problems
