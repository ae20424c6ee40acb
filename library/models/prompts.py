"""Prompt weights in the syntax that web user interfaces share: (more), (this much:1.3), [less]; BREAK.

Source of the syntax: sd-scripts' generators. Every text is a valid prompt: brackets that do not pair up and weights
that are no numbers are taken literally.
"""

import math
import re

ROUND_FACTOR = 1.1
SQUARE_FACTOR = 1 / 1.1
MAX_WEIGHT = 1e6  # a product of weights stays within these bounds, far from what a float32 can hold
BREAK = "BREAK"

Segment = tuple[str, float]
_PIECE = re.compile(r"\\[()\[\]\\]|\\|[()\[\]]|:([+-]?[.\d]+)\)|[^\\()\[\]:]+|:")


def parse_weighted(text: str, *, breaks: bool = False) -> list[Segment]:
    """Cut a prompt into (text, weight) segments; at least one, neighbours of equal weight are one.

    `(x)` multiplies by 1.1, `(x:w)` by w, `[x]` divides by 1.1; nesting multiplies; a bracket that is not closed
    reaches to the end; a backslash makes the next bracket or backslash a letter. With `breaks` every "BREAK" becomes
    a segment of its own with weight 1. Weights are finite, between -1e6 and 1e6.
    """
    segments: list[Segment] = []
    round_starts: list[int] = []
    square_starts: list[int] = []
    for match in _PIECE.finditer(text):
        piece, number = match[0], _number(match[1])
        if piece == "(":
            round_starts.append(len(segments))
        elif piece == "[":
            square_starts.append(len(segments))
        elif piece == "]" and square_starts:
            _multiply(segments, square_starts.pop(), SQUARE_FACTOR)
        elif number is not None and round_starts:
            _multiply(segments, round_starts.pop(), number)
        elif piece == ")" and round_starts:
            _multiply(segments, round_starts.pop(), ROUND_FACTOR)
        elif match[1] and number is None and round_starts:  # ":1.2.3)" is no weight, but it closes the bracket
            segments.append((piece[:-1], 1.0))
            _multiply(segments, round_starts.pop(), ROUND_FACTOR)
        else:
            segments += _literal(piece.removeprefix("\\"), breaks)
    for start in round_starts:
        _multiply(segments, start, ROUND_FACTOR)
    for start in square_starts:
        _multiply(segments, start, SQUARE_FACTOR)
    return _merged(segments, breaks) or [("", 1.0)]


def _number(text: str | None) -> float | None:
    """The weight that `text` spells; None when it spells none or one too large to compute with."""
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) else None


def _literal(text: str, breaks: bool) -> list[Segment]:
    if not breaks or BREAK not in text:
        return [(text, 1.0)]
    segments: list[Segment] = []
    for index, between in enumerate(text.split(BREAK)):
        if index:
            segments.append((BREAK, 1.0))
        segments.append((between, 1.0))
    return segments


def _multiply(segments: list[Segment], start: int, factor: float) -> None:
    segments[start:] = [(text, max(-MAX_WEIGHT, min(MAX_WEIGHT, weight * factor))) for text, weight in segments[start:]]


def _merged(segments: list[Segment], breaks: bool) -> list[Segment]:
    merged: list[Segment] = []
    for text, weight in segments:
        if breaks and text == BREAK:
            merged.append((BREAK, 1.0))
        elif merged and merged[-1][1] == weight and not (breaks and merged[-1][0] == BREAK):
            merged[-1] = (merged[-1][0] + text, weight)
        elif text:
            merged.append((text, weight))
    return merged
