r"""Prompts that choose their words: `{red|blue}`, `{2$$ and $$a|b|c}`, `{e$$a|b}`, `__colours__`. No torch.

    {[e$$][N$$ | N-M$$][separator$$]option|option|…}

N (or N to M) different options in random order, joined by the separator (", "); one when nothing is said. Options may
hold groups of their own, which choose first. With e$$ a group is no choice: every combination is a prompt. `\{` and
`\}` are braces. `__name__` is a line of the wildcard file name.txt, and a group that holds nothing else has its lines
as options. Source: gen_img.md §4; wildcards, escapes and nesting in every place are this suite's.
"""

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

from library.inference.prompt_source import PromptLine
from library.inference.wildcards import Wildcards

SEPARATOR = ", "
MAX_FORMS = 10_000  # prompts that the e$$ groups of one line may stand for
MAX_DEPTH = 40  # groups in groups, and wildcards in wildcards
_MAX_WORK = 10**6  # options times options per combination, of which there are then too many
_ESCAPED = re.compile(r"\\([{}])")
_PIECE = re.compile(r"\\[{}]|[{}|]|__([^\W_][\w/.\-]*?)__|[^\\{}|_]+|[\\_]")
_HEADER = re.compile(r"(?P<every>[eE]\$\$)?(?:(?P<count>[\d\-]+)\$\$)?(?:(?P<separator>(?:(?!\$\$)[^|{}])+)\$\$)?")
_COUNT = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class Wildcard:
    """`__name__` at start:end of a line: any entry of its file, or the one given."""

    name: str
    line: PromptLine
    start: int
    end: int
    entry: PromptLine | None = None


@dataclass(frozen=True)
class Group:
    """`{…}`: low to high of the options, every combination or a random one; start:end is its place in the line."""

    options: tuple["Tree", ...]
    every: bool
    low: int
    high: int
    separator: str
    line: PromptLine
    start: int
    end: int


Tree = tuple[str | Wildcard | Group, ...]  # texts keep their escapes


def unescape(text: str) -> str:
    r"""The text with `\{` and `\}` as braces."""
    return _ESCAPED.sub(r"\1", text)


def read_template(line: PromptLine, wildcards: Wildcards) -> Tree:
    """The groups and wildcards of a line; without a wildcard folder `__name__` is text.

    Raises UserError with a caret for braces that do not pair up, counts that cannot be had and wildcard files that
    are not there.
    """
    return _Reader(line, wildcards).read()


def forms(tree: Tree) -> list[Tree]:
    """The prompts that a line's e$$ groups stand for, without such groups: at least one.

    The first group changes slowest; within a group few options come before many, else as they are listed. Raises
    UserError when there are more than MAX_FORMS.
    """
    for node in tree:
        if isinstance(node, Group) and _count((node,)) > MAX_FORMS:
            raise node.line.error(
                f"these are more than {MAX_FORMS} combinations",
                node.start,
                node.end,
                fix="ask for fewer, or remove e$$",
            )
    if _count(tree) > MAX_FORMS:
        line = next(node.line for node in tree if isinstance(node, Group))
        raise line.error(f"these are more than {MAX_FORMS} combinations", 0, len(line.text), fix="remove an e$$")
    return list(_forms(tree))


def render(tree: Tree, chance: random.Random, wildcards: Wildcards) -> str:
    """The words of one picture, by chance, braces still escaped; a tree without e$$ groups.

    Raises UserError for wildcards that lead to themselves or to files that are not there.
    """
    return _render(tree, chance, wildcards, ())


def fixed_text(tree: Tree) -> str:
    """What a line says whatever is chosen, with a NUL for each choice."""
    return "".join(node if isinstance(node, str) else "\0" for node in tree)


# --- reading -----------------------------------------------------------------------------------------------------


class _Open:
    """A group whose closing brace has not come yet; the line itself is one too."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.header: re.Match[str] | None = None
        self.options: list[list[str | Wildcard | Group]] = [[]]

    def add(self, node: str | Wildcard | Group) -> None:
        option = self.options[-1]
        if isinstance(node, str) and option and isinstance(option[-1], str):
            option[-1] += node
        else:
            option.append(node)


class _Reader:
    def __init__(self, line: PromptLine, wildcards: Wildcards) -> None:
        self.line, self.wildcards = line, wildcards

    def read(self) -> Tree:
        stack, place, text = [_Open(0)], 0, self.line.text
        while place < len(text):
            match = _PIECE.match(text, place)
            assert match is not None, text[place:]
            piece, place = match[0], match.end()
            if piece == "{":
                place = self._open(stack, place)
            elif piece == "}":
                if len(stack) == 1:
                    raise self.line.error("this brace closes nothing", match.start(), fix=r"write \} for a brace")
                stack[-2].add(self._group(stack.pop(), end=place))
            elif piece == "|" and len(stack) > 1:
                stack[-1].options.append([])
            elif match[1] and self.wildcards:
                self._lines(node := Wildcard(match[1], self.line, match.start(), match.end()))
                stack[-1].add(node)
            else:
                stack[-1].add(piece)
        if len(stack) > 1:
            what = "this brace is not closed"
            raise self.line.error(what, stack[-1].start, fix=r"add }, or write \{ for a brace")
        return tuple(stack[0].options[0])

    def _open(self, stack: list[_Open], place: int) -> int:
        if len(stack) > MAX_DEPTH:
            raise self.line.error(f"braces are nested more than {MAX_DEPTH} deep", place - 1)
        group = _Open(place - 1)
        group.header = _HEADER.match(self.line.text, place)
        assert group.header is not None  # every part of it may be missing
        stack.append(group)
        return group.header.end()

    def _group(self, opened: _Open, *, end: int) -> Group:
        header = opened.header
        assert header is not None
        options = [tuple(option) for option in opened.options]
        if len(options) == 1 and len(options[0]) == 1 and isinstance(options[0][0], Wildcard):
            only = options[0][0]
            options = [(replace(only, entry=entry),) for entry in self._lines(only)]
        if options == [()]:
            raise self.line.error("there is nothing in these braces", opened.start, end, fix=r"write \{\} for braces")
        low, high = self._count_of(header, len(options))
        separator = header["separator"]
        return Group(
            tuple(options),
            bool(header["every"]),
            low,
            high,
            SEPARATOR if separator is None else separator,
            self.line,
            opened.start,
            end,
        )

    def _count_of(self, header: re.Match[str], num_options: int) -> tuple[int, int]:
        if header["count"] is None:
            return 1, 1
        place = header.span("count")
        match = _COUNT.fullmatch(header["count"])
        if match is None:
            raise self.line.error("this is no count", *place, fix="write a number such as 2, or a range such as 1-3")
        low, high = sorted((int(match[1]), int(match[2] or match[1])))
        if low > num_options:
            what = f"{low} different options are asked for, and there are {num_options}"
            raise self.line.error(what, *place, fix=f"lower it to {num_options} or add options")
        return low, min(high, num_options)

    def _lines(self, card: Wildcard) -> list[PromptLine]:
        return self.wildcards.lines(card.name, asked_by=self.line, start=card.start, end=card.end)


def _entry(line: PromptLine, wildcards: Wildcards) -> Tree:
    """The tree of a wildcard file's line, which may choose but not enumerate."""
    tree = read_template(line, wildcards)
    if group := _first_every(tree):
        what = "e$$ cannot stand in a wildcard file: which line is taken is left to chance"
        raise line.error(what, group.start, group.end, fix="remove e$$")
    return tree


def _first_every(tree: Tree) -> Group | None:
    for node in tree:
        if isinstance(node, Group):
            found = node if node.every else next(filter(None, map(_first_every, node.options)), None)
            if found:
                return found
    return None


# --- enumerating and choosing ------------------------------------------------------------------------------------


def _count(tree: Tree) -> int:
    """How many forms a tree has; for an e$$ group the sum of the elementary symmetric polynomials of its options'."""
    total = 1
    for node in tree:
        if not isinstance(node, Group):
            continue
        counts = [_count(option) for option in node.options]
        if not node.every:
            total = min(total * math.prod(counts), MAX_FORMS + 1)
            continue
        if len(counts) * node.high > _MAX_WORK:
            return MAX_FORMS + 1
        ways = [1] + [0] * node.high
        for count in counts:
            for chosen in range(node.high, 0, -1):
                ways[chosen] = min(ways[chosen] + count * ways[chosen - 1], MAX_FORMS + 1)
        total = min(total * sum(ways[node.low :]), MAX_FORMS + 1)
    return total


def _forms(tree: Tree) -> Iterator[Tree]:
    for parts in product(*(_node_forms(node) for node in tree)):
        yield tuple(piece for part in parts for piece in part)


def _node_forms(node: str | Wildcard | Group) -> list[Tree]:
    if not isinstance(node, Group):
        return [(node,)]
    if _first_every((node,)) is None:
        return [(node,)]
    if not node.every:
        return [(replace(node, options=options),) for options in product(*map(_forms, node.options))]
    found: list[Tree] = []
    for count in range(node.low, node.high + 1):
        for chosen in combinations(node.options, count):
            for options in product(*map(_forms, chosen)):
                found.append(_joined(options, node.separator))
    return found


def _joined(options: tuple[Tree, ...], separator: str) -> Tree:
    nodes: list[str | Wildcard | Group] = []
    for index, option in enumerate(options):
        nodes += [separator, *option] if index else option
    return tuple(nodes)


def _render(tree: Tree, chance: random.Random, wildcards: Wildcards, inside: tuple[str, ...]) -> str:
    words = []
    for node in tree:
        if isinstance(node, str):
            words.append(node)
        elif isinstance(node, Wildcard):
            words.append(_line_of(node, chance, wildcards, inside))
        else:
            options = [_render(option, chance, wildcards, inside) for option in node.options]
            count = chance.randint(node.low, node.high)
            words.append(node.separator.join(chance.sample(options, count)))
    return "".join(words)


def _line_of(card: Wildcard, chance: random.Random, wildcards: Wildcards, inside: tuple[str, ...]) -> str:
    if card.name in inside or len(inside) >= MAX_DEPTH:
        way = " -> ".join(f"__{name}__" for name in (*inside, card.name))
        raise card.line.error("this wildcard leads to itself: " + way, card.start, card.end, fix="remove it here")
    line = card.entry
    if line is None:
        line = chance.choice(wildcards.lines(card.name, asked_by=card.line, start=card.start, end=card.end))
    return _render(_entry(line, wildcards), chance, wildcards, (*inside, card.name))
