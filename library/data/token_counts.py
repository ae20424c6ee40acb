"""How many captions of a data set are longer than the text encoders are shown, and which length would hold them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from library.data.captions import whole_captions
from library.data.progress import progress_bar
from library.data.table import ImageTable

CountTokens = Callable[[Sequence[str]], list[int]]
"""Captions -> their lengths in tokens, without begin and end token."""

CHUNK = 75
"""Tokens that the text encoders of SDXL take at a time; a caption length is a multiple of it."""

CAPTIONS_AT_ONCE = 16384


@dataclass(frozen=True)
class TokenSummary:
    """`cut` of `captions` captions (one per image) lose their end at `limit` tokens; the longest has `longest`."""

    captions: int
    cut: int
    longest: int
    limit: int

    @property
    def sufficient(self) -> int:
        """The smallest multiple of 75 at which no caption loses text."""
        return max(1, -(-self.longest // CHUNK)) * CHUNK

    def text(self) -> str:
        """One line for the log."""
        if not self.cut:
            return f"captions: at most {self.longest} tokens, none is cut off at max_token_length {self.limit}"
        return (
            f"captions: {self.cut} of {self.captions} lose their end at max_token_length {self.limit}; the longest has "
            f"{self.longest} tokens, so none would at max_token_length {self.sufficient}"
        )


def count_tokens(table: ImageTable, count: CountTokens, *, limit: int) -> TokenSummary:
    """Measure the longest wording of the caption of every image that is used.

    An image with a caption of several lines counts as cut when one of the lines that may be chosen is.
    """
    lengths = token_lengths(table, count)
    return TokenSummary(
        captions=len(lengths),
        cut=int((lengths > limit).sum()),
        longest=int(lengths.max(initial=0)),
        limit=limit,
    )


def token_lengths(table: ImageTable, count: CountTokens) -> np.ndarray:
    """The tokens of the longest wording for each of `table.images`, int64; equal captions are tokenised once."""
    wholes: dict[tuple[str, int], list[str]] = {}
    keys = [(table.captions.text(image), int(table.subset_of[image])) for image in table.images.tolist()]
    for image, key in zip(table.images.tolist(), keys, strict=True):
        if key not in wholes:
            wholes[key] = whole_captions(key[0], table.subset(image))
    lengths = count_texts({text for lines in wholes.values() for text in lines}, count)
    longest = {key: max(lengths[line] for line in lines) for key, lines in wholes.items()}
    return np.array([longest[key] for key in keys], dtype=np.int64)


def count_texts(texts: Collection[str], count: CountTokens) -> dict[str, int]:
    """The length of each text in tokens."""
    distinct = sorted(set(texts))
    lengths: dict[str, int] = {}
    with progress_bar(len(distinct), title="counting tokens", unit="caption", delay=2.0) as bar:
        for start in range(0, len(distinct), CAPTIONS_AT_ONCE):
            chunk = distinct[start : start + CAPTIONS_AT_ONCE]
            lengths.update(zip(chunk, count(chunk), strict=True))
            bar.update(len(chunk))
    return lengths
