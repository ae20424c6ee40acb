"""The caption pipeline: a list of small steps from the stored caption to what is tokenised.

Order and meaning follow sd-scripts (spec dataset_config.md §8), with one difference: prefix and suffix are put on the
line that was chosen, not on the first and last line of the file. Every draw comes from the sample's own
`random.Random`, and the token warm-up looks at the step that the sample is used in.

A text cache may keep several wordings of a caption, its variants. Their draws come from the record's key and the
variant's number alone, so that what lies on a disk fits every seed and every epoch.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from library.config.dataset_file import SubsetSpec
from library.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class CaptionContext:
    """What a step may look at. `epoch` counts from 1, as users count; optimizer steps count from 0.

    `total_steps` is the length of the run, which only a token warm-up given as a share of it needs.
    """

    subset: SubsetSpec
    rng: random.Random
    epoch: int
    step: int = 0
    total_steps: int | None = None


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
    """Keep one line of a caption of several lines: any of them with `enable_wildcard`, else the first."""
    lines = caption.split("\n")
    if context.subset.enable_wildcard and len(lines) > 1:
        return context.rng.choice(lines)
    return lines[0]


def add_affixes(caption: str, context: CaptionContext) -> str:
    """Put the subset's prefix before and its suffix after the caption, one space between."""
    subset = context.subset
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    if subset.caption_suffix:
        caption = f"{caption} {subset.caption_suffix}"
    return caption


def expand_wildcards(caption: str, context: CaptionContext) -> str:
    """Put one of its alternatives, which may be empty, in the place of every {a|b}.

    Braces do not nest; {{ and }} stand for single braces. Without `enable_wildcard` braces are text.
    """
    return _expand(caption, context.rng.choice) if context.subset.enable_wildcard else caption


def _expand(caption: str, choose: Callable[[list[str]], str]) -> str:
    if "{" not in caption and "}" not in caption:
        return caption
    for pair, mark in _PROTECTED.items():
        caption = caption.replace(pair, mark)
    caption = _WILDCARD.sub(lambda match: choose(match[1].split("|")), caption)
    for pair, mark in _PROTECTED.items():
        caption = caption.replace(mark, pair[0])
    return caption


_WILDCARD = re.compile(r"\{([^}]+)\}")
# Unicode's noncharacters: they stand for nothing in any text that is exchanged, so no caption uses them.
_PROTECTED = {"{{": "\ufdd0", "}}": "\ufdd1"}


def edit_tags(caption: str, context: CaptionContext) -> str:
    """Warm up, shuffle and thin out the tags; a caption that needs none of it is left as it is, to the letter."""
    if not has_tag_edits(context.subset):
        return caption
    parts = split_tags(caption, context.subset)
    flexible = parts.flexible
    for step in TAG_STEPS:
        flexible = step(flexible, context)
    return ", ".join(parts.fixed + flexible + parts.suffix)


def warm_up_tags(flexible: list[str], context: CaptionContext) -> list[str]:
    """Keep the first parts only: `token_warmup_min` of them at step 0, all of them from the warm-up's last step on."""
    least, length = context.subset.token_warmup_min, warmup_steps(context.subset, context.total_steps)
    if context.step >= length:
        return flexible
    return flexible[: math.floor(context.step * ((len(flexible) - least) / length)) + least]


def warmup_steps(subset: SubsetSpec, total_steps: int | None) -> int:
    """The length of the token warm-up in optimizer steps; a share of the run is rounded down."""
    length = subset.token_warmup_step
    if not isinstance(length, float):
        return length
    assert total_steps is not None, "a warm-up over a share of the run needs the length of the run"
    return math.floor(length * total_steps)


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


def unify_separators(caption: str, context: CaptionContext) -> str:
    """Replace the secondary separator, which keeps parts together until here, by the separator."""
    mark = context.subset.secondary_separator
    return caption.replace(mark, context.subset.caption_separator) if mark else caption


def take_template(caption: str, context: CaptionContext) -> str:
    """Put one of the subset's templates, if it has any, in the place of the caption."""
    templates = context.subset.templates
    return context.rng.choice(templates) if templates else caption


TAG_STEPS: tuple[TagStep, ...] = (warm_up_tags, shuffle_tags, drop_tags)
FIXED_STEPS: tuple[Step, ...] = (choose_line, add_affixes, unify_separators)
VARIANT_STEPS: tuple[Step, ...] = (choose_line, add_affixes, expand_wildcards, edit_tags, unify_separators)
STEPS: tuple[Step, ...] = (drop_caption, *VARIANT_STEPS, take_template)


def has_tag_edits(subset: SubsetSpec) -> bool:
    """Whether captions are cut into their parts and joined again, which changes the spaces around separators."""
    return subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0


def has_one_wording(subset: SubsetSpec) -> bool:
    """Whether a caption of the subset is the same on every visit, unless it is dropped."""
    return not has_tag_edits(subset) and not subset.enable_wildcard


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


def process_caption(
    caption: str,
    subset: SubsetSpec,
    *,
    rng: random.Random,
    epoch: int,
    step: int = 0,
    total_steps: int | None = None,
) -> str:
    """The caption that one sample trains with on one visit; "" when it is dropped. See CaptionContext."""
    return _run(STEPS, caption, CaptionContext(subset, rng, epoch, step, total_steps))


def fixed_caption(caption: str, subset: SubsetSpec) -> str:
    """The caption with every step that is the same on each visit: what a text cache encodes.

    The subset must have one wording.
    """
    return fixed_wording(subset)(caption)


def fixed_wording(subset: SubsetSpec) -> Callable[[str], str]:
    """`fixed_caption` for many captions of one subset."""
    context = CaptionContext(subset, _UNUSED, epoch=1)
    return lambda caption: _run(FIXED_STEPS, caption, context)


def caption_variant(caption: str, subset: SubsetSpec, *, key: str, number: int) -> str:
    """Variant `number` (from 0) of the caption of the record `key`: every step but the dropout of whole captions.

    A subset with one wording has one variant. The subset must have no token warm-up, which would make wordings
    depend on the step.
    """
    if has_one_wording(subset):
        return fixed_caption(caption, subset)
    assert not subset.token_warmup_step, "a cached caption knows no step"
    rng = random.Random(derive_seed("text variant", key, number))
    return _run(VARIANT_STEPS, caption, CaptionContext(subset, rng, epoch=1))


def is_dropped(subset: SubsetSpec, *, rng: random.Random, epoch: int) -> bool:
    """Whether the whole caption is dropped on one visit; `process_caption` draws this first, too."""
    return drop_caption("", CaptionContext(subset, rng, epoch)) is None


def whole_captions(caption: str, subset: SubsetSpec) -> list[str]:
    """The longest texts that training may make of a caption, one for each line that may be chosen.

    Nothing is dropped; of the alternatives of a wildcard the one of most letters is taken.
    """
    if subset.templates:
        return list(subset.templates)
    lines = caption.split("\n") if subset.enable_wildcard else [caption.split("\n", 1)[0]]
    context = CaptionContext(subset, _UNUSED, epoch=1)
    wholes = []
    for line in lines:
        text = add_affixes(line, context)
        if subset.enable_wildcard:
            text = _expand(text, lambda parts: max(parts, key=len))
        if has_tag_edits(subset):
            parts = split_tags(text, subset)
            text = ", ".join(parts.fixed + parts.flexible + parts.suffix)
        wholes.append(unify_separators(text, context))
    return wholes


_UNUSED = random.Random(0)
"""For steps that draw nothing; making a generator takes longer than they do."""


def _run(steps: tuple[Step, ...], caption: str, context: CaptionContext) -> str:
    for step in steps:
        result = step(caption, context)
        if result is None:
            return ""
        caption = result
    return caption
