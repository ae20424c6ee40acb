"""Captions that are too long are counted at start, and the length that would hold them is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.dataset import build_train_data
from library.models.token_ids import count_tokens
from library.models.tokenizers import load_tokenizer
from tests.data.specs import dataset, subset, write_picture


def summary(folder, captions, *, max_token_length=75, count=None, **changes):
    for number, caption in enumerate(captions):
        write_picture(folder / f"{number}.png", 64, 64, caption=caption)
    count = count or (lambda texts: count_tokens(load_tokenizer(), texts))
    settings = {"count_tokens": count, "max_token_length": max_token_length}
    return build_train_data([dataset(subset(folder, **changes))], seed=1, **settings).summary()


@pytest.mark.parametrize(("length", "cut", "sufficient"), [(75, 3, 225), (150, 1, 225), (225, 0, 225)])
def test_cut_captions_and_the_sufficient_length(tmp_path, length, cut, sufficient):
    found = summary(tmp_path, ["cat " * n for n in (75, 76, 150, 151)], max_token_length=length).tokens
    assert (found.captions, found.cut, found.longest, found.sufficient) == (4, cut, 151, sufficient)


def test_the_summary_says_it_in_a_sentence(tmp_path):
    text = summary(tmp_path, ["cat " * 80, "cat"]).text()
    assert "captions: 1 of 2 lose their end at max_token_length 75" in text
    assert "none would at max_token_length 150" in text
    assert "at most 1 tokens, none is cut off" in summary(tmp_path, ["cat", "dog"]).text()


def test_equal_captions_are_tokenised_once_and_counted_each(tmp_path):
    seen = []

    def count(texts):
        seen.extend(texts)
        return [100] * len(texts)

    found = summary(tmp_path, ["x", "x", "y"], count=count, num_repeats=5).tokens
    assert sorted(seen) == ["x", "y"]
    assert (found.captions, found.cut) == (3, 3)


def test_prefixes_and_every_line_count(tmp_path):
    changes = {"enable_wildcard": True, "caption_prefix": "a b c"}
    assert summary(tmp_path, ["cat\n" + "dog " * 73], **changes).tokens.cut == 1
    assert summary(tmp_path, ["cat\n" + "dog " * 72], **changes).tokens.cut == 0


def test_weights_are_no_tokens():
    tokenizer = load_tokenizer()
    assert count_tokens(tokenizer, ["(cat:1.2)", "cat"], weighted=True) == [1, 1]
    assert count_tokens(tokenizer, ["cat"]) == [1]


PIECES = st.sampled_from(
    [" ", "  ", "a", "cat", "Σ", "é", "e\u0301", "\u0301", "'s", "1girl", "'", "<|endoftext|>", "\t", "猫", "_", ","]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(PIECES | st.text(max_size=3), max_size=8).map("".join), max_size=4))
def test_counting_by_words_gives_the_length_of_the_whole_caption(captions):
    tokenizer = load_tokenizer()
    assert count_tokens(tokenizer, captions) == [len(tokenizer.encode(caption)) for caption in captions]
