"""Token ids of captions with weights, and how many there are. Needs no torch."""

from collections.abc import Sequence

from library.models.prompts import parse_weighted
from library.models.tokenizers import ClipTokenizer


def count_tokens(tokenizer: ClipTokenizer, captions: Sequence[str], *, weighted: bool = False) -> list[int]:
    """The number of tokens of each caption, without begin and end token and without a limit."""
    if weighted:
        return [len(weighted_ids(tokenizer, caption)[0]) for caption in captions]
    # No token reaches over a space, and captions have few distinct words: that saves most of the work.
    words = {word for caption in captions for word in caption.split(" ")}
    lengths = dict(zip(words, map(len, tokenizer.encode_all(list(words))), strict=True))
    return [sum([lengths[word] for word in caption.split(" ")]) for caption in captions]


def weighted_ids(tokenizer: ClipTokenizer, caption: str) -> tuple[list[int], list[float]]:
    """Token ids of a caption and the weight of each; every segment of equal weight is tokenised on its own."""
    segments = parse_weighted(caption)
    ids: list[int] = []
    weights: list[float] = []
    for segment_ids, (_, weight) in zip(tokenizer.encode_all([text for text, _ in segments]), segments, strict=True):
        ids += segment_ids
        weights += [weight] * len(segment_ids)
    return ids, weights
