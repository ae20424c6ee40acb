"""The caption pipeline: a list of small steps from the stored caption to what is tokenised.

Order and meaning follow sd-scripts, with one difference: prefix and suffix are put on the line that was chosen, not
on the first and last line of the file. Every draw comes from the sample's own `random.Random`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from library.config.dataset_file import SubsetSpec


@dataclass(frozen=True, slots=True)
class CaptionContext:
    """What a step may look at. `epoch` counts from 1, as users count."""

    subset: SubsetSpec
    rng: random.Random
    epoch: int


@dataclass(frozen=True, slots=True)
class TagParts:
    """A caption split into parts: only `flexible` is shuffled and thinned out."""

    fixed: list[str]
    flexible: list[str]
    suffix: list[str]


Step = Callable[[str, CaptionContext], str | None]
"""Takes and returns the caption; None means that the caption is dropped and no later step runs."""

TagStep = Callable[[list[str], CaptionContext], list[str]]
"""Takes and returns the flexible parts."""


def drop_caption(caption: str, context: CaptionContext) -> str | None:
    """Drop the whole caption, by chance or in every n-th epoch."""
    subset = context.subset
    if subset.caption_dropout_rate > 0 and context.rng.random() < subset.caption_dropout_rate:
        return None
    every = subset.caption_dropout_every_n_epochs
    if every > 0 and context.epoch % every == 0:
        return None
    return caption


def choose_line(caption: str, context: CaptionContext) -> str:
    """Keep the first line of a caption of several lines."""
    return caption.split("\n", 1)[0]


def add_affixes(caption: str, context: CaptionContext) -> str:
    """Put the subset's prefix before and its suffix after the caption, one space between."""
    subset = context.subset
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    if subset.caption_suffix:
        caption = f"{caption} {subset.caption_suffix}"
    return caption


def edit_tags(caption: str, context: CaptionContext) -> str:
    """Shuffle and thin out the tags; a caption that needs neither is left as it is, to the letter."""
    if not has_tag_edits(context.subset):
        return caption
    parts = split_tags(caption, context.subset)
    flexible = parts.flexible
    for step in TAG_STEPS:
        flexible = step(flexible, context)
    return ", ".join(parts.fixed + flexible + parts.suffix)


def shuffle_tags(flexible: list[str], context: CaptionContext) -> list[str]:
    """Put the parts into random order."""
    if not context.subset.shuffle_caption:
        return flexible
    return context.rng.sample(flexible, len(flexible))


def drop_tags(flexible: list[str], context: CaptionContext) -> list[str]:
    """Drop each part by chance."""
    rate = context.subset.caption_tag_dropout_rate
    if rate <= 0:
        return flexible
    return [part for part in flexible if context.rng.random() >= rate]


TAG_STEPS: tuple[TagStep, ...] = (shuffle_tags, drop_tags)
FIXED_STEPS: tuple[Step, ...] = (choose_line, add_affixes)
STEPS: tuple[Step, ...] = (drop_caption, *FIXED_STEPS, edit_tags)


def has_tag_edits(subset: SubsetSpec) -> bool:
    """Whether the subset's captions change from visit to visit other than by being dropped."""
    return subset.shuffle_caption or subset.caption_tag_dropout_rate > 0


def split_tags(caption: str, subset: SubsetSpec) -> TagParts:
    """Split a caption into its fixed head, flexible middle and fixed tail.

    With `keep_tokens_separator` in the caption its first two occurrences are the borders, empty parts vanish, and
    `keep_tokens` is ignored. Otherwise the first `keep_tokens` parts are fixed and empty parts stay.
    """
    mark = subset.keep_tokens_separator
    separator = subset.caption_separator
    if mark and mark in caption:
        head, _, rest = caption.partition(mark)
        middle, _, tail = rest.partition(mark)
        return TagParts(*([tag for tag in _parts(text, separator) if tag] for text in (head, middle, tail)))
    tags = _parts(caption.strip(), separator)
    return TagParts(tags[: subset.keep_tokens], tags[subset.keep_tokens :], [])


def _parts(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator)]


def process_caption(caption: str, subset: SubsetSpec, *, rng: random.Random, epoch: int) -> str:
    """The caption that one sample trains with in one epoch (counted from 1); "" when it is dropped."""
    return _run(STEPS, caption, CaptionContext(subset, rng, epoch))


def fixed_caption(caption: str, subset: SubsetSpec) -> str:
    """The caption with every step that is the same on each visit: what a text cache encodes."""
    return _run(FIXED_STEPS, caption, CaptionContext(subset, random.Random(0), epoch=1))


def _run(steps: tuple[Step, ...], caption: str, context: CaptionContext) -> str:
    for step in steps:
        result = step(caption, context)
        if result is None:
            return ""
        caption = result
    return caption
