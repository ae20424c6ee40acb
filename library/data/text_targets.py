"""Which encoded captions a run needs: the wordings of its images as columns of ids, grouped into cache entries.

A wording has a slot: variant `v` of the caption of an image is slot `starts[image] + v`. Its text is not kept but made
again when it is to be encoded; what is kept are 64 bits that stand for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from library.data.caching import group_targets
from library.data.captions import caption_variant, fixed_wording, has_one_wording
from library.data.table import ImageTable, text_id

_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplying by it loses nothing


def caption_id(caption: str, *, max_token_length: int, weighted: bool) -> int:
    """64 bits that stand for an encoded caption, whichever encoders made it."""
    return text_id(caption + _suffix(max_token_length, weighted))


def _suffix(max_token_length: int, weighted: bool) -> str:
    return f"\0{max_token_length}\0{int(weighted)}"


class Wordings:
    """The wordings that a cache holds of every image in use: `num_variants` of each, one where a subset has only one.

    `starts` is int64 (num_images + 1,); `ids` uint64, the `caption_id` of every slot.
    """

    def __init__(self, table: ImageTable, *, num_variants: int, max_token_length: int, weighted: bool) -> None:
        self.table = table
        of_subset = np.array([1 if has_one_wording(subset) else num_variants for subset in table.subsets])
        images = table.images
        counts = np.zeros(table.num_images, dtype=np.int64)
        counts[images] = of_subset[table.subset_of[images]]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.ids = np.fromiter(
            self._ids(counts, suffix=_suffix(max_token_length, weighted)), np.uint64, self.starts[-1]
        )

    def _ids(self, counts: np.ndarray, *, suffix: str) -> Iterator[int]:
        """The ids in the order of the slots; with a million images, what is done here for each counts."""
        table = self.table
        wordings = [fixed_wording(subset) if has_one_wording(subset) else None for subset in table.subsets]
        images = table.images
        for image, subset in zip(images.tolist(), table.subset_of[images].tolist(), strict=True):
            wording = wordings[subset]
            if wording is not None:
                yield text_id(wording(table.captions.text(image)) + suffix)
            else:
                for variant in range(counts[image]):
                    yield text_id(self.text(image, variant) + suffix)

    def text(self, image: int, variant: int) -> str:
        """One wording."""
        table = self.table
        return caption_variant(
            table.captions.text(image), table.subset(image), key=table.keys.text(image), number=variant
        )

    def by_caption(self) -> TextTargets:
        """One entry per distinct wording."""
        slots = np.arange(len(self.ids))
        grouped = group_targets(slots, (self.ids,), total=len(slots))
        return TextTargets(self, first=grouped.first, number_of=grouped.number_of)

    def by_file(self) -> TextTargets:
        """One entry per image file and list of wordings."""
        images, starts = self.table.images, self.starts
        lists = np.zeros(len(images), dtype=np.uint64)
        counts = starts[images + 1] - starts[images]
        for variant in range(counts.max(initial=0)):
            longer = counts > variant
            lists[longer] = lists[longer] * _MIX + self.ids[starts[images[longer]] + variant]
        grouped = group_targets(images, (lists, self.table.path_ids[images]), total=self.table.num_images)
        number_of = np.repeat(grouped.number_of[images], counts)
        list_ids = lists[np.searchsorted(images, grouped.first)]
        return TextTargets(self, first=starts[grouped.first], number_of=number_of, list_ids=list_ids)


class TextTargets:
    """The distinct entries to be had.

    `first` (int64) holds for each the slot that it begins with, ascending; `number_of` (int64) for each slot the number
    of its entry. An entry is one wording; with `list_ids` (uint64, 64 bits for each list) all wordings of the caption
    of an image.
    """

    def __init__(
        self, wordings: Wordings, *, first: np.ndarray, number_of: np.ndarray, list_ids: np.ndarray | None = None
    ) -> None:
        self.wordings, self.first, self.number_of = wordings, first, number_of
        self.list_ids = list_ids

    def __len__(self) -> int:
        return len(self.first)

    @property
    def images(self) -> np.ndarray:
        """The images that stand for the entries, int64."""
        return np.searchsorted(self.wordings.starts, self.first, side="right") - 1

    def image(self, number: int) -> int:
        """The image that stands for an entry."""
        return int(np.searchsorted(self.wordings.starts, self.first[number], side="right")) - 1

    def ids(self, number: int) -> list[int]:
        """The ids of the wordings of an entry, in the order of their variants; equal ones repeat."""
        first = int(self.first[number])
        end = int(self.wordings.starts[self.image(number) + 1]) if self.list_ids is not None else first + 1
        return self.wordings.ids[first:end].tolist()

    def texts(self, number: int) -> list[str]:
        """The wordings of an entry, in the same order."""
        image, count = self.image(number), len(self.ids(number))
        variant = int(self.first[number] - self.wordings.starts[image])
        return [self.wordings.text(image, variant + offset) for offset in range(count)]

    @property
    def first_ids(self) -> np.ndarray:
        """For every entry the id of its first wording, uint64: all there is to say of entries of one wording."""
        return self.wordings.ids[self.first]
