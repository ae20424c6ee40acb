"""The weight syntax of prompts."""

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from library.models.prompts import BREAK, MAX_WEIGHT, parse_weighted


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("plain", [("plain", 1)]),
        ("", [("", 1)]),
        ("()", [("", 1)]),
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        ("((b))", [("b", 1.21)]),
        ("(b:1.3)", [("b", 1.3)]),
        ("(b:-0.5)", [("b", -0.5)]),
        ("(b:+2)", [("b", 2)]),
        ("(b:.5)", [("b", 0.5)]),
        ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),
        ("[b]", [("b", 1 / 1.1)]),
        ("[[b]]", [("b", 1 / 1.21)]),
        ("[b:1.3]", [("b:1.3", 1 / 1.1)]),
        ("([b])", [("b", 1)]),
        ("(open b", [("open b", 1.1)]),
        ("[open (both", [("open ", 1 / 1.1), ("both", 1)]),
        ("stray) b:1.2) c]", [("stray) b:1.2) c]", 1)]),
        (r"\(b\) \[c\] \\d", [(r"(b) [c] \d", 1)]),
        (r"(a\):2)", [("a)", 2)]),
        ("a: b, c:d", [("a: b, c:d", 1)]),
        ("(b: 1.3)", [("b: 1.3", 1.1)]),
        ("(b:1.2.3) c", [("b:1.2.3", 1.1), (" c", 1)]),
        ("(b:.) c", [("b:.", 1.1), (" c", 1)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("a BREAK b", [("a BREAK b", 1)]),
    ],
)
def test_segments(text: str, segments: list[tuple[str, float]]):
    found = parse_weighted(text)
    assert [part for part, _ in found] == [part for part, _ in segments]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in segments])


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("a BREAK b", [("a ", 1), (BREAK, 1), (" b", 1)]),
        ("BREAKfast", [(BREAK, 1), ("fast", 1)]),
        ("aBREAKBREAK", [("a", 1), (BREAK, 1), (BREAK, 1)]),
        ("(a BREAK b:2)", [("a ", 2), (BREAK, 1), (" b", 2)]),
    ],
)
def test_break_is_a_segment_of_its_own_when_asked_for(text: str, segments: list[tuple[str, float]]):
    assert parse_weighted(text, breaks=True) == segments


@given(st.text(alphabet="ab()[]:\\.+-012 BREAK", max_size=40), st.booleans())
@example("(a:" + "9" * 400 + ")", False)
@example("(" * 8000 + "a", False)
@example("((a:" + "9" * 300 + "):" + "9" * 300 + ")", False)
@example("((a:" + "9" * 300 + "):-" + "9" * 300 + ")[b:0]", True)
def test_every_text_is_a_prompt(text: str, breaks: bool):
    segments = parse_weighted(text, breaks=breaks)
    assert segments
    assert all(math.isfinite(weight) and abs(weight) <= MAX_WEIGHT for _, weight in segments)
    for (one, weight), (other, next_weight) in pairwise(segments):
        assert weight != next_weight or BREAK in (one, other)


@given(st.text(alphabet=st.characters(exclude_characters="()[]\\"), max_size=40))
def test_text_without_brackets_is_one_segment(text: str):
    assert parse_weighted(text) == [(text, 1.0)]


@given(st.text(alphabet="ab é猫()[]-1.BREAK", max_size=40), st.booleans())
def test_no_letter_is_lost_or_moved(text: str, breaks: bool):
    said = "".join(part for part, _ in parse_weighted(text, breaks=breaks))
    drop = str.maketrans("", "", "()[]")
    assert said.translate(drop) == text.translate(drop)


@given(st.text(alphabet="ab ()[]:", max_size=20), st.sampled_from(["1.5", "-0.25", ".5", "2"]))
def test_escaped_text_in_a_weight_is_conserved(text: str, weight: str):
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)
    assert parse_weighted(f"({escaped}:{weight})") == [(text, float(weight))] or not text
