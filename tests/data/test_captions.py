"""The caption pipeline: order of the steps, what survives, and that a seed decides everything."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import fixed_caption, process_caption, whole_captions
from tests.data.specs import subset

tags = st.text("abcdefg ", min_size=1, max_size=6).map(str.strip).filter(bool)
captions = st.lists(tags, min_size=1, max_size=8)


def process(caption, *, seed=0, epoch=1, step=0, total_steps=None, **settings):
    rng = random.Random(seed)
    return process_caption(caption, subset(**settings), rng=rng, epoch=epoch, step=step, total_steps=total_steps)


def split(caption):
    return caption.split(", ") if caption else []


@given(captions, st.integers(0, 9), st.integers())
def test_kept_tokens_stay_in_front_and_no_tag_is_lost(parts, keep, seed):
    out = split(process(",".join(parts), seed=seed, shuffle_caption=True, keep_tokens=keep))
    assert out[:keep] == parts[:keep]
    assert Counter(out) == Counter(parts)


@given(captions, st.integers(0, 9), st.integers(), st.floats(0.01, 1))
def test_tag_dropout_spares_kept_tokens_and_keeps_the_order(parts, keep, seed, rate):
    out = split(process(",".join(parts), seed=seed, keep_tokens=keep, caption_tag_dropout_rate=rate))
    assert out[:keep] == parts[:keep]
    rest = iter(parts[keep:])
    assert all(tag in rest for tag in out[keep:])


@given(captions, captions, captions, st.integers())
def test_separators_fix_the_head_and_the_tail(head, middle, tail, seed):
    text = f"{', '.join(head)} ||| {', '.join(middle)} ||| {', '.join(tail)}"
    out = split(process(text, seed=seed, shuffle_caption=True, keep_tokens_separator="|||", keep_tokens=99))
    assert out[: len(head)] == head and out[-len(tail) :] == tail
    assert Counter(out[len(head) : -len(tail)]) == Counter(middle)


@given(captions, st.integers(), st.integers(1, 9))
def test_a_seed_decides_everything(parts, seed, epoch):
    settings = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.5, "caption_dropout_rate": 0.3}
    text = ",".join(parts)
    assert process(text, seed=seed, epoch=epoch, **settings) == process(text, seed=seed, epoch=epoch, **settings)


def test_shuffling_reaches_every_order():
    orders = {process("a,b,c", seed=seed, shuffle_caption=True) for seed in range(100)}
    assert len(orders) == 6


def test_a_caption_that_needs_no_edit_stays_to_the_letter():
    text = "a ,, b|||c "
    assert process(text, keep_tokens=1, keep_tokens_separator="|||") == text


def test_edited_captions_are_joined_by_comma_and_space_whatever_the_separator():
    assert process("a;b; c", caption_separator=";", shuffle_caption=True, keep_tokens=3) == "a, b, c"


def test_empty_parts_vanish_only_with_a_keep_tokens_separator():
    assert process("a,,b", shuffle_caption=True, keep_tokens=3) == "a, , b"
    assert process("a,,b||c,,", keep_tokens_separator="||", shuffle_caption=True) == "a, b, c"


def test_a_third_separator_is_text():
    out = process("a || b || c || d", keep_tokens_separator="||", shuffle_caption=True)
    assert out == "a, b, c || d"


def test_prefix_and_suffix_are_on_the_chosen_line():
    assert process("first\nsecond", caption_prefix="p,", caption_suffix="s") == "p, first s"


def test_dropout_drops_prefix_and_suffix_too():
    assert process("a", caption_prefix="p", caption_dropout_rate=1.0) == ""


def test_dropout_happens_at_its_rate():
    dropped = sum(process("a", seed=seed, caption_dropout_rate=0.25) == "" for seed in range(2000))
    assert 430 < dropped < 570


def test_tags_are_dropped_at_their_rate():
    kept = sum(len(split(process("a,b,c,d", seed=seed, caption_tag_dropout_rate=0.25))) for seed in range(500))
    assert 1430 < kept < 1570


def test_every_nth_epoch_drops_all_captions_counting_from_one():
    seen = [process("a", epoch=epoch, caption_dropout_every_n_epochs=3) for epoch in range(1, 8)]
    assert seen == ["a", "a", "", "a", "a", "", "a"]


@pytest.mark.parametrize("seed", range(5))
def test_the_fixed_caption_is_what_remains_without_chance(seed):
    settings = {"caption_prefix": "p", "caption_suffix": "s", "caption_dropout_rate": 0.5}
    out = process("a, b\nc", seed=seed, **settings)
    assert out in ("", fixed_caption("a, b\nc", subset(**settings)))
    assert fixed_caption("a, b\nc", subset(**settings)) == "p a, b s"


@pytest.mark.parametrize(
    ("text", "outcomes"),
    [
        ("x {a|b} y", {"x a y", "x b y"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a}", {"a"}),
        ("{a|}", {"a", ""}),
        ("{}", {"{}"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{{{a|b}}}", {"{a", "{b}"}),  # pairs are taken from the left, as in sd-scripts: "}}" belongs to b
        ("{a}}", {"{a}"}),
        ("a } b { c", {"a } b { c"}),
        ("one\ntwo, {a|b}", {"one", "two, a", "two, b"}),
    ],
)
def test_wildcards_reach_every_outcome_and_no_other(text, outcomes):
    assert {process(text, seed=seed, enable_wildcard=True) for seed in range(100)} == outcomes


def test_without_wildcards_braces_are_text_and_the_first_line_counts():
    assert process("{a|b} {{c}}\nsecond") == "{a|b} {{c}}"


def test_affixes_are_on_the_chosen_line_and_their_wildcards_are_expanded():
    settings = {"enable_wildcard": True, "caption_prefix": "{p|q},", "caption_suffix": "s"}
    out = {process("one\ntwo", seed=seed, **settings) for seed in range(60)}
    assert out == {"p, one s", "q, one s", "p, two s", "q, two s"}


def test_the_secondary_separator_keeps_parts_together_until_the_end():
    settings = {"secondary_separator": ";;;", "shuffle_caption": True}
    out = {process("a;;;b, c", seed=seed, **settings) for seed in range(20)}
    assert out == {"a,b, c", "c, a,b"}
    assert process("a;;;b", secondary_separator=";;;") == fixed_caption("a;;;b", subset(secondary_separator=";;;"))
    assert process("a/b", secondary_separator="/", caption_separator=" ; ") == "a ; b"


# 1 kept part and 6 movable ones; floor(step * (6 - 2) / 8) + 2 of them until step 8
@pytest.mark.parametrize(("step", "movable"), [(0, 2), (1, 2), (2, 3), (3, 3), (4, 4), (6, 5), (7, 5), (8, 6), (99, 6)])
def test_the_token_warm_up_takes_the_first_parts(step, movable):
    tags = ["k", *"abcdef"]
    settings = {"keep_tokens": 1, "token_warmup_min": 2}
    assert process(",".join(tags), step=step, token_warmup_step=8, **settings) == ", ".join(tags[: movable + 1])
    # a quarter of a run of 35 steps, rounded down
    assert process(",".join(tags), step=step, total_steps=35, token_warmup_step=0.25, **settings) == ", ".join(
        tags[: movable + 1]
    )


def test_a_warm_up_shorter_than_a_step_uses_every_part():
    assert process("a,b,c", step=0, total_steps=3, token_warmup_step=0.1) == "a, b, c"


def test_fewer_parts_than_the_least_are_all_used():
    assert [process("a,b", step=step, token_warmup_min=5, token_warmup_step=10) for step in range(10)] == ["a, b"] * 10


@given(captions, st.integers(0, 9), st.integers(), st.integers(0, 40), st.integers(0, 9))
def test_the_token_warm_up_spares_kept_tokens_and_loses_none_in_the_end(parts, keep, seed, step, least):
    settings = {"shuffle_caption": True, "keep_tokens": keep, "token_warmup_min": least, "token_warmup_step": 20}
    out = split(process(",".join(parts), seed=seed, step=step, **settings))
    assert out[:keep] == parts[:keep]
    assert not Counter(out) - Counter(parts)
    assert step < 20 or Counter(out) == Counter(parts)


@given(st.text("ab{}|,; \n", max_size=20), st.integers(), st.integers(0, 12))
def test_every_step_together_depends_on_the_seed_only_and_no_text_is_refused(text, seed, step):
    settings = {
        "enable_wildcard": True,
        "secondary_separator": ";",
        "shuffle_caption": True,
        "token_warmup_step": 0.5,
        "caption_tag_dropout_rate": 0.2,
        "caption_prefix": "p",
    }
    once, again = (process(text, seed=seed, step=step, total_steps=20, **settings) for _ in range(2))
    assert once == again and ";" not in once


def test_the_longest_wording_has_every_line_and_the_longer_alternative():
    settings = {"enable_wildcard": True, "caption_suffix": "s", "shuffle_caption": True, "secondary_separator": ";"}
    assert whole_captions("a ,b;{c|dd}\ne", subset(**settings)) == ["a, b,dd s", "e s"]
    assert whole_captions("a ,b\ne", subset(caption_dropout_rate=1.0)) == ["a ,b"]
