"""Counts over the captions of a data set: lengths, tags, and captions that several images share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from library.data.inspection import ImageFacts

MOST_BINS = 30
BIN_WIDTHS = (5, 15, 25, 75)
"""Tokens; each divides 75, and so every limit, so that no bin reaches across it."""


def caption_lengths(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Bins (first, last, count) of caption lengths in tokens; the last bin holds everything that is longer."""
    longest = max(lengths, default=0)
    width = next((width for width in BIN_WIDTHS if longest <= width * MOST_BINS), BIN_WIDTHS[-1])
    counts = Counter(min(max(0, length - 1) // width, MOST_BINS - 1) for length in lengths)
    bins = [(i * width + (i > 0), (i + 1) * width, counts[i]) for i in range(max(counts, default=-1) + 1)]
    return bins[:-1] + [(first, max(last, longest), count) for first, last, count in bins[-1:]]


def tag_frequencies(images: Sequence[ImageFacts]) -> dict[str, int]:
    """How many images have each part of a caption (of the tags alone where a source keeps them apart), most first."""
    counts: Counter[str] = Counter()
    for image in images:
        record = image.record
        text = record.caption if record.tags is None else record.tags
        parts = (part.strip() for line in text.split("\n") for part in line.split(record.subset.caption_separator))
        counts.update({part for part in parts if part})
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def repeated_captions(images: Sequence[ImageFacts]) -> dict[str, int]:
    """Captions, as they are stored, that several images have, most first."""
    counts = Counter(image.record.caption for image in images)
    return {caption: count for caption, count in counts.most_common() if count > 1}
