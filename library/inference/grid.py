"""Which pictures a contact sheet has, and where: `--grid prompts x "steps=10,20,30"`. No torch.

The words are the axis of the rows and that of the columns, with or without an x between them. One axis alone is that of
the columns, and the prompts are the rows. Prompts and seeds that are no axis give a sheet each. All prompts share
their seeds, as with iter_same_seed, so that pictures differ in what the axes say.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from library.config.choices import SAMPLERS, default_eta
from library.errors import Problem, UserError
from library.inference.plan import Place, PlanOptions, placed
from library.inference.prompt_line import finite
from library.inference.prompt_source import PromptLine, distinct
from library.inference.request import CELL, MAX_SIDE, MAX_STEPS, SEED_END, SMALLEST_SIDE, GenRequest
from library.inference.wildcards import Wildcards
from library.log import get_logger
from library.sizes import Size

logger = get_logger(__name__)

PROMPTS, SEEDS = "prompts", "seeds"
_WHERE = "--grid"


@dataclass(frozen=True)
class Axis:
    """A name and its values; prompts, and seeds without values of their own, have none here."""

    name: str
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Sheet:
    """A contact sheet: `cells` are numbers of pictures (from 0) in rows and columns; axes: (rows, columns)."""

    axes: tuple[str, str]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[int, ...], ...]
    title: str = ""


@dataclass(frozen=True)
class GridPlan:
    """The pictures of a run in the order in which they are drawn, and the sheets that they go to."""

    requests: list[GenRequest]
    sheets: list[Sheet]


def read_axes(words: Sequence[str], *, num_networks: int = 0) -> tuple[Axis, Axis]:
    """The axis of the rows and that of the columns. num_networks: how many networks have a strength to change.

    Raises UserError with a caret for what is not known, cannot be read or is there twice.
    """
    typed = re.sub(r"[\"']", " ", " ".join(words))  # those of a shell, within others that the shell has taken away
    line = PromptLine(re.sub(r"\s*([=,/])\s*", r"\1", typed), _WHERE)
    axes: list[Axis] = []
    problems: list[Problem] = []
    for match in re.finditer(r"\S+", line.text):
        if match[0].lower() in ("x", "×"):
            continue
        try:
            axis = _read_axis(line, match.start(), match[0], num_networks)
            if axis.name in [other.name for other in axes]:
                raise line.error(f"{axis.name} is an axis already", *match.span(), fix="name another one")
            axes.append(axis)
        except UserError as error:
            problems += error.problems
        if len(axes) == 3:
            fix = "leave one out; prompts and seeds that are no axis have a sheet each"
            raise line.error("a sheet has two axes, rows and columns", *match.span(), fix=fix)
    if problems:
        raise UserError.from_problems(distinct(problems))
    if not axes:
        raise line.error("no axis is named", 0, len(line.text), fix='name one, such as seeds or "steps=10,20"')
    if len(axes) == 1:
        axes = [axes[0], Axis(SEEDS)] if axes[0].name == PROMPTS else [Axis(PROMPTS), axes[0]]
    return axes[0], axes[1]


def plan_grid(
    lines: Sequence[PromptLine],
    axes: tuple[Axis, Axis],
    defaults: GenRequest,
    how: PlanOptions,
    *,
    wildcards: Wildcards | None = None,
) -> GridPlan:
    """The pictures and the sheets of prompt lines. An axis comes before what a line says about the same.

    Raises UserError for prompts that cannot be read, as plan() does, and for pictures that cannot be.
    """
    by_name = {axis.name: axis for axis in axes}
    given = by_name[SEEDS].values if SEEDS in by_name else ()
    if given:
        if how.images_per_prompt not in (1, len(given)):
            logger.warning("images_per_prompt is ignored: the grid names %d seeds", len(given))
        how = replace(how, images_per_prompt=len(given), seeds=given)
    if SEEDS in by_name and how.images_per_prompt == 1 and not given and axes[0].name != PROMPTS:
        fix = "raise images_per_prompt, or name them: seeds=1,2,3"
        raise UserError("seeds has one value only: images_per_prompt is 1", _WHERE, fix)
    pictures = dict(placed(lines, defaults, replace(how, iter_same_seed=True, shuffled=False), wildcards=wildcards))
    prompts = sorted({(place.line, place.form) for place in pictures})
    plan = GridPlan([], [])
    loose = [
        range(how.n_iter),
        [None] if PROMPTS in by_name else prompts,
        [None] if SEEDS in by_name else range(how.images_per_prompt),
    ]
    for page in product(*loose):
        _add_sheet(plan, pictures, page, [(axis.name, _values(axis, prompts, how)) for axis in axes])
    names = {PROMPTS: _prompt_names(lines, pictures)}
    problems = list(_impossible(plan.requests))
    if problems:
        raise UserError.from_problems(problems)
    return GridPlan(plan.requests, [_labelled(sheet, plan.requests, names[PROMPTS]) for sheet in plan.sheets])


# --- axes --------------------------------------------------------------------------------------------------------


def _whole(text: str, *, low: int, high: int) -> int:
    value = int(text) if re.fullmatch(r"\d{1,20}", text) else -1
    if not low <= value <= high:
        raise ValueError(f"must be a whole number from {low} to {high}")
    return value


def _number(text: str) -> float:
    try:
        return finite(text)
    except ValueError as error:
        raise ValueError("is too large" if "large" in str(error) else "is not a number") from None


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise ValueError("must lie between 0 and 1")
    return value


def _strength(text: str) -> float:
    value = _share(text)
    if value == 0:
        raise ValueError("must be above 0")
    return value


def _sampler(text: str) -> str:
    if text in SAMPLERS:
        return text
    near = difflib.get_close_matches(text, SAMPLERS, n=1)
    raise ValueError(f"is not a sampler: did you mean {near[0]}?" if near else "is none of " + ", ".join(SAMPLERS))


def _size(text: str) -> Size:
    match = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text)
    sides = [int(side) for side in match.groups()] if match else [0]
    if any(side % CELL or not SMALLEST_SIDE <= side <= MAX_SIDE for side in sides):
        raise ValueError(f"must be two multiples of {CELL}, at least {SMALLEST_SIDE}, such as 832x1216")
    return Size(*sides)


def _strengths(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split("/"))


def _scale_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else _number(text)


# name -> (field of a request, reader of a value, the option that says the same in a prompt line)
_AXES: dict[str, tuple[str, Callable[[str], Any], str]] = {
    SEEDS: ("seed", partial(_whole, low=0, high=SEED_END - 1), "d"),
    "steps": ("steps", partial(_whole, low=1, high=MAX_STEPS), "s"),
    "scale": ("scale", _number, "l"),
    "sampler": ("sampler", _sampler, ""),
    "eta": ("eta", _share, ""),
    "negative_scale": ("negative_scale", _scale_or_none, "nl"),
    "guidance_rescale": ("guidance_rescale", _share, ""),
    "network_mul": ("network_muls", _strengths, "am"),
    "strength": ("strength", _strength, "t"),
    "size": ("size", _size, "w"),
}
_OTHER_NAMES = {
    "prompt": PROMPTS, "seed": SEEDS, "step": "steps", "cfg": "scale", "scales": "scale", "samplers": "sampler",
    "sizes": "size", "multipliers": "network_mul", "network_muls": "network_mul", "network_multipliers": "network_mul",
    "lora": "network_mul", "weights": "network_mul",
}  # fmt: skip


def _read_axis(line: PromptLine, start: int, word: str, num_networks: int) -> Axis:
    name, has_values, text = word.partition("=")
    end = start + len(name)
    if name == PROMPTS:
        if has_values:
            raise line.error(
                "prompts takes no values: they are those of the run", end, start + len(word), fix="remove it"
            )
        return Axis(PROMPTS)
    if name not in _AXES:
        near = difflib.get_close_matches(name, (PROMPTS, *_AXES), n=1)
        guess = _OTHER_NAMES.get(name.lower()) or (near[0] if near else "")
        fix = f"did you mean {guess}?" if guess else "known: " + ", ".join((PROMPTS, *_AXES))
        raise line.error(f'"{name}" is no axis', start, end, fix=fix)
    if name == SEEDS and not has_values:
        return Axis(SEEDS)
    if not text:
        raise line.error(f"{name} has no values", start, start + len(word), fix=f"write {name}=a,b,c")
    values: list[Any] = []
    place = end + 1
    for part in text.split(","):
        try:
            value = _AXES[name][1](part)
            if name == "network_mul" and len(value) > num_networks:
                raise ValueError("has nothing to act on: " + (
                    f"there are {num_networks} networks that are not merged" if num_networks else "no network is loaded"
                ))  # fmt: skip
            if value in values:
                raise ValueError("is there twice")
        except ValueError as error:
            raise line.error(f"{name}: {part or 'the value'} {error}", place, place + len(part)) from None
        values.append(value)
        place += len(part) + 1
    return Axis(name, tuple(values))


def _values(axis: Axis, prompts: Sequence[tuple[int, int]], how: PlanOptions) -> Sequence[Any]:
    if axis.name == PROMPTS:
        return prompts
    return range(how.images_per_prompt) if axis.name == SEEDS else axis.values


def _at(request: GenRequest, name: str, value: Any) -> GenRequest:
    """The request with a value of an axis; its line says so too, where lines can, and draws the same again."""
    field, _, option = _AXES[name]
    words = {
        "size": lambda: f"{value.w} --h {value.h}",
        "network_mul": lambda: ",".join(f"{strength:g}" for strength in value),
    }
    said = words[name]() if name in words else "none" if value is None else f"{value}"
    raw = f"{request.raw} --{option} {said}" if option else request.raw
    return replace(request, raw=raw, **{field: value})


# --- sheets ------------------------------------------------------------------------------------------------------


def _add_sheet(
    plan: GridPlan, pictures: dict[Place, GenRequest], page: tuple[Any, ...], axes: Sequence[tuple[str, Sequence[Any]]]
) -> None:
    """The pictures of one sheet, row by row. page: the time, and the prompt and the seed of all of them, if any."""
    (row_name, row_values), (column_name, column_values) = axes
    cells = []
    for row in row_values:
        numbers = []
        for column in column_values:
            chosen = {PROMPTS: page[1], SEEDS: page[2], row_name: row, column_name: column}
            request = pictures[Place(page[0], *chosen.pop(PROMPTS), chosen.pop(SEEDS))]
            for name, value in chosen.items():
                request = _at(request, name, value)
            numbers.append(len(plan.requests))
            plan.requests.append(request)
        cells.append(tuple(numbers))
    labels = [tuple(_label(name, value) for value in values) for name, values in axes]
    plan.sheets.append(Sheet((row_name, column_name), *labels, tuple(cells), f"{page[1] or ''}"))


def _label(name: str, value: Any) -> str:
    if name == "network_mul":
        return "network_mul " + ", ".join(f"{strength:g}" for strength in value)
    if name == "size":
        return f"{value.w} x {value.h}"
    return str(value) if name in ("sampler", PROMPTS, SEEDS) else f"{name} {'none' if value is None else f'{value:g}'}"


def _labelled(sheet: Sheet, requests: Sequence[GenRequest], prompts: dict[str, str]) -> Sheet:
    """The sheet with the words of its prompts and, where a row or a column has one seed, that seed."""
    rows, columns = sheet.rows, sheet.columns
    seeds = [[requests[number].seed for number in row] for row in sheet.cells]
    if sheet.axes[0] == SEEDS:
        rows = tuple(_seed_label(row, number) for number, row in enumerate(seeds, start=1))
    if sheet.axes[1] == SEEDS:
        columns = tuple(_seed_label(list(column), n) for n, column in enumerate(zip(*seeds, strict=True), start=1))
    if sheet.axes[0] == PROMPTS:
        rows = tuple(prompts[label] for label in rows)
    if sheet.axes[1] == PROMPTS:
        columns = tuple(prompts[label] for label in columns)
    title = [prompts[sheet.title]] if sheet.title else []
    if SEEDS not in sheet.axes and len({seed for row in seeds for seed in row}) == 1:
        title.append(f"seed {seeds[0][0]}")
    return replace(sheet, rows=rows, columns=columns, title=", ".join(title))


def _seed_label(seeds: Sequence[int | None], number: int) -> str:
    return f"seed {seeds[0]}" if len(set(seeds)) == 1 else f"picture {number}"


def _prompt_names(lines: Sequence[PromptLine], pictures: dict[Place, GenRequest]) -> dict[str, str]:
    """What to write for each prompt, by its place: the line, or the prompt of its form where it has several."""
    forms: dict[int, set[int]] = {}
    for place in pictures:
        forms.setdefault(place.line, set()).add(place.form)
    return {
        f"{(place.line, place.form)}": lines[place.line].text if len(forms[place.line]) == 1 else request.prompt
        for place, request in reversed(pictures.items())
    }


def _impossible(requests: Sequence[GenRequest]) -> list[Problem]:
    """What no sampler can draw, whatever the model."""
    found = {
        request.sampler for request in requests if request.eta is not None and default_eta(request.sampler) is None
    }
    return [Problem(f"{name} has no eta", _WHERE, "take ddim, euler_a or dpmpp_sde") for name in sorted(found)]
