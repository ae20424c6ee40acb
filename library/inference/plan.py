"""From prompt lines to the pictures of a run: which words, which seed, in which order. No torch."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from library.errors import Problem, UserError
from library.inference.dynamic_prompts import Tree, fixed_text, forms, read_template, render, unescape
from library.inference.prompt_line import parse_line, seeds_of
from library.inference.prompt_source import PromptLine, distinct
from library.inference.request import MAX_SEED, GenRequest
from library.inference.wildcards import Wildcards


@dataclass(frozen=True)
class PlanOptions:
    """How often the lines are drawn, and what their seeds are.

    The whole list is gone through n_iter times (shuffled: each time in another order), and each prompt is drawn
    images_per_prompt times. seed: None for random ones. iter_same_seed: all prompts of one time have the same seeds.
    seeds: those of the images_per_prompt pictures of every prompt, whatever it says itself. repeatable: random seeds
    are an error, since the same is to be planned again. regions: how many networks act in parts of the picture, each
    with a sub-prompt of its own.
    """

    images_per_prompt: int = 1
    n_iter: int = 1
    seed: int | None = None
    iter_same_seed: bool = False
    shuffled: bool = False
    seeds: tuple[int, ...] = ()
    repeatable: bool = False
    regions: int = 0


class Place(NamedTuple):
    """Where a picture comes from, each from 0: which time (n_iter), line, form of the line, picture of the prompt."""

    iteration: int
    line: int
    form: int
    index: int


@dataclass(frozen=True)
class _Template:
    """A line and its number; forms are the prompts that its e$$ groups stand for, seeds those it gives for certain."""

    number: int
    line: PromptLine
    forms: list[Tree]
    seeds: tuple[int, ...]


Lines = Sequence[PromptLine] | Callable[[int | None], Sequence[PromptLine]]


def plan(
    lines: Lines, defaults: GenRequest, how: PlanOptions, *, wildcards: Wildcards | None = None
) -> list[GenRequest]:
    """Every picture of a run with its words and its seed, in the order in which they are drawn.

    A picture takes the seed that its line gives with `--d`; where there is none, a run with one picture takes `seed`,
    with several the next number of sd-scripts' stream `random.Random(seed).randint(0, 2^31 - 1)`, and without `seed`
    a random one. The words of a picture are chosen by `random.Random(its seed)`: the same line and seed say the same,
    whatever else is drawn. Pictures of one e$$ line share the seeds of `--d`: the first for the first of the
    images_per_prompt of every combination, and so on.

    lines may be a function that is called each time the list is gone through, with the first of the seeds that its
    pictures share (None: they share none), and has an order of its own.

    Raises UserError with all problems of all lines.
    """
    return [request for _, request in placed(lines, defaults, how, wildcards=wildcards)]


def placed(
    lines: Lines, defaults: GenRequest, how: PlanOptions, *, wildcards: Wildcards | None = None
) -> list[tuple[Place, GenRequest]]:
    """The same with the place that each picture comes from."""
    wildcards = wildcards or Wildcards()
    rounds, shared, seeds, problems = _rounds(lines, how, wildcards)
    if how.repeatable:
        shown = {id(template): template for templates in rounds for template in templates}
        problems += _random_seeds(list(shown.values()), how)
    planned: list[tuple[Place, GenRequest]] = []
    for place, template, form, seed in _walk(rounds, shared, how, seeds):
        try:
            request = _picture(template.line, form, defaults, seed, wildcards, how.regions)
        except UserError as error:
            problems += error.problems
            continue
        own = () if how.seeds else request.seeds
        planned.append((place, replace(request, seed=own[place.index] if place.index < len(own) else seed)))
    if problems:
        raise UserError.from_problems(distinct(problems))
    return planned


def _walk(
    rounds: Sequence[Sequence[_Template]], shared: Sequence[Sequence[int]], how: PlanOptions, seeds: _Seeds
) -> Iterator[tuple[Place, _Template, Tree, int]]:
    """Every picture in the order in which it is drawn, with the seed that chooses its words."""
    for iteration, (templates, same) in enumerate(zip(rounds, shared, strict=True)):
        for template in templates:
            for index in range(how.images_per_prompt):
                for number, form in enumerate(template.forms):
                    own = how.seeds or template.seeds
                    given = own[index] if index < len(own) else None
                    seed = given if given is not None else same[index] if same else seeds.next()
                    yield Place(iteration, template.number, number, index), template, form, seed


def _random_seeds(templates: Sequence[_Template], how: PlanOptions) -> Iterator[Problem]:
    """What would be different the next time."""
    if how.seed is not None:
        return
    if how.shuffled:
        yield Problem("the order of the prompts would be another one each time", "shuffle_prompts", "give --seed")
    for template in templates:
        if len(how.seeds or template.seeds) < how.images_per_prompt:
            what = "this prompt would have random seeds, and resume_bulk and prompts_per_rank need the same ones again"
            yield Problem(what, f"{template.line.where}: {template.line.text}", "give --seed, or seeds with --d")


def _rounds(
    lines: Lines, how: PlanOptions, wildcards: Wildcards
) -> tuple[list[list[_Template]], list[list[int]], _Seeds, list[Problem]]:
    """For every time that the lines are gone through: the templates in order, and the seeds that its pictures share
    ([]: none); then where the other seeds come from, and the problems.
    """
    if callable(lines):
        seeds = _Seeds(how.seed, alone=False)
        shared = _shared(how, seeds)
        found = [_templates(lines(same[0] if same else None), wildcards) for same in shared]
        rounds, problems = [templates for templates, _ in found], [p for _, several in found for p in several]
        if how.iter_same_seed:
            return rounds, shared, seeds, problems
    else:
        templates, problems = _templates(lines, wildcards)
        rounds = [_shuffled(templates, how, iteration) for iteration in range(how.n_iter)]
    total = sum(len(template.forms) for templates in rounds for template in templates) * how.images_per_prompt
    seeds = _Seeds(how.seed, alone=total == 1)
    return rounds, _shared(how, seeds), seeds, problems


def _shared(how: PlanOptions, seeds: _Seeds) -> list[list[int]]:
    count = how.images_per_prompt if how.iter_same_seed else 0
    return [[seeds.next() for _ in range(count)] for _ in range(how.n_iter)]


def _shuffled(templates: Sequence[_Template], how: PlanOptions, iteration: int) -> list[_Template]:
    """The templates in the order of one time through, by a generator of its own, so that shuffling changes no seed of
    the stream."""
    order = list(templates)
    if how.shuffled:
        seed = secrets.randbits(64) if how.seed is None else how.seed
        random.Random(f"order of the prompts {seed} {iteration}").shuffle(order)
    return order


class _Seeds:
    """Seeds of a run: sd-scripts' stream, the seed itself for a single picture, or random ones."""

    def __init__(self, seed: int | None, *, alone: bool) -> None:
        self._seed, self._alone, self._stream = seed, alone, random.Random(seed)

    def next(self) -> int:
        if self._seed is None:
            return secrets.randbelow(MAX_SEED + 1)
        return self._seed if self._alone else self._stream.randint(0, MAX_SEED)


def _templates(lines: Sequence[PromptLine], wildcards: Wildcards) -> tuple[list[_Template], list[Problem]]:
    templates, problems = [], []
    for number, line in enumerate(lines):
        try:
            tree = read_template(line, wildcards)
            templates.append(_Template(number, line, forms(tree), seeds_of(fixed_text(tree))))
        except UserError as error:
            problems += error.problems
    return templates, problems


def _picture(
    line: PromptLine, form: Tree, defaults: GenRequest, seed: int, wildcards: Wildcards, regions: int
) -> GenRequest:
    """One picture of a line; `raw` is the line with its choices made, and draws the same again as a prompt line."""
    words = render(form, random.Random(seed), wildcards)
    where = line.where if words == line.text else f"{line.where}, with the words that were chosen"
    return replace(parse_line(PromptLine(unescape(words), where), defaults, regions=regions), raw=words.strip())
