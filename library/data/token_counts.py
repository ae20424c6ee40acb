"""How many captions of a data set are longer than the text encoders are shown, and which length would hold them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """Measure the longest wording of every image's caption; equal captions are tokenised once.

    An image with a caption of several lines counts as cut when one of the lines that may be chosen is.
    """
    wholes: dict[tuple[str, int], list[str]] = {}
    uses: Counter[tuple[str, int]] = Counter()
    images = table.images.tolist()
    for image in images:
        key = (table.captions.text(image), int(table.subset_of[image]))
        uses[key] += 1
        if key not in wholes:
            wholes[key] = whole_captions(key[0], table.subset(image))
    texts = sorted({text for lines in wholes.values() for text in lines})
    lengths: dict[str, int] = {}
    with progress_bar(len(texts), title="counting tokens", unit="caption", delay=2.0) as bar:
        for start in range(0, len(texts), CAPTIONS_AT_ONCE):
            chunk = texts[start : start + CAPTIONS_AT_ONCE]
            lengths.update(zip(chunk, count(chunk), strict=True))
            bar.update(len(chunk))
    longest = {key: max(lengths[line] for line in lines) for key, lines in wholes.items()}
    return TokenSummary(
        captions=len(images),
        cut=sum(uses[key] for key, length in longest.items() if length > limit),
        longest=max(longest.values(), default=0),
        limit=limit,
    )
