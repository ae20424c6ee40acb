"""The options of a prompt that set Deep Shrink and Gradual Latent for its pictures (gen_img.md section 3). No torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from library.config.choices import split_sampler
from library.config.unsharp import parse_unsharp
from library.inference.request import GenRequest

_DEPTH, _TIMESTEPS = 3, 650  # where a prompt has other options of an effect, and nothing says these
_WHOLE, _FLOAT = r"[+-]?\d+", r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_MOST_BLOCKS, _MOST_STEPS, _MOST_TIMESTEPS = 8, 1000, 1000

Change = Callable[[GenRequest, str], GenRequest]


def _option(effect: str, switch: str, default: int, field: str, convert: Callable[[str], Any]) -> Change:
    """Sets a field of an effect, which acts from then on: its switch gets a default where nothing has set it."""

    def change(request: GenRequest, value: str) -> GenRequest:
        old = getattr(request, effect)
        on = replace(old, **{switch: default}) if getattr(old, switch) is None else old
        return replace(request, **{effect: replace(on, **{field: convert(value)})})

    return change


_shrink = partial(_option, "deep_shrink", "depth_1", _DEPTH)
_gradual = partial(_option, "gradual_latent", "timesteps", _TIMESTEPS)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(f"must lie between {low} and {high}")
        return value

    return convert


def _share(*, one: bool = False) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = float(text)
        if not 0 < value < 1 and not (one and value == 1):
            raise ValueError("must lie above 0 and " + ("not above 1" if one else "below 1"))
        return value

    return convert


def _factor(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or not 0 <= value <= 10:
        raise ValueError("must lie between 0 and 10")
    return value


# name -> (what a value looks like, what it changes)
EFFECT_OPTIONS: dict[str, tuple[str, Change]] = {
    "dsd1": (_WHOLE, _shrink("depth_1", _whole(0, _MOST_BLOCKS))),
    "dst1": (_WHOLE, _shrink("timesteps_1", _whole(0, _MOST_TIMESTEPS))),
    "dsd2": (_WHOLE, _shrink("depth_2", _whole(0, _MOST_BLOCKS))),
    "dst2": (_WHOLE, _shrink("timesteps_2", _whole(0, _MOST_TIMESTEPS))),
    "dsr": (_FLOAT, _shrink("ratio", _share())),
    "glt": (_WHOLE, _gradual("timesteps", _whole(1, _MOST_TIMESTEPS))),
    "glr": (_FLOAT, _gradual("ratio", _share())),
    "gle": (_WHOLE, _gradual("every_n_steps", _whole(1, _MOST_STEPS))),
    "gls": (_FLOAT, _gradual("ratio_step", _share(one=True))),
    "glsn": (_FLOAT, _gradual("s_noise", _factor)),
    "glus": (r"[-+\d.,e ]+", _gradual("unsharp", parse_unsharp)),
}


def effects_that_cannot_act(request: GenRequest) -> Iterator[tuple[str, str, str]]:
    """(a pattern of the options' names, what is wrong, what to do) for what a line says of effects without effect."""
    shrink = request.deep_shrink
    if shrink.is_on and shrink.depth_2 is None:
        yield "dst2", "there is no second depth", "add one with --dsd2, or remove it"
    elif shrink.is_on and shrink.timesteps_2 >= shrink.timesteps_1:
        what = f"the second depth acts from timestep {shrink.timesteps_1} down to {shrink.timesteps_2}, so never"
        yield "dsd2|dst2|dst1", what, "set a lower end with --dst2"
    if request.gradual_latent.is_on and split_sampler(request.sampler)[0] != "euler_a":
        yield r"gl[a-z]+", f"Gradual Latent is for euler_a, not for {request.sampler}", "draw with --sampler euler_a"
