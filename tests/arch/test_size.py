"""Files tell one story and functions fit a screen."""

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.arch import tree

LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60
LINES_OF_AN_ENTRY_POINT = 80
PARAMETERS = 8

# name -> why it may be longer. An entry that is no longer needed fails a test, so the list only shrinks.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
MANY_PARAMETERS: dict[str, str] = {
    "library/config/fields.py::option": "each parameter is one property of an option, named where the option stands",
    "library/io/fingerprint.py::latent_fingerprint": "each parameter is one thing that an entry is made from",
}
LONG_ENTRY_POINTS: dict[str, str] = {
    "tools/demo_pictures.py": "draws for the demo alone; the library has no use for it",
    "tools/quickstart.py": "runs before anything is installed, so it can import nothing of the library",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(name: str) -> Iterator[tuple[str, Function]]:
    """(file::Class.function, node) of every function of a file, nested ones too."""

    def walk(node: ast.AST, path: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield f"{name}::{path}{child.name}", child
                yield from walk(child, f"{path}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{path}{child.name}.")
            else:
                yield from walk(child, path)

    return walk(tree.parse(name), "")


def code_lines(node: Function) -> int:
    """Lines from `def` to the end, without the docstring: it explains shapes and sources, and should not be cut."""
    total = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        total -= first.end_lineno - first.lineno + 1
    return total


def parameters(node: Function) -> int:
    """Number of parameters, `self` and `cls` left out; a **mapping counts as one."""
    given = node.args
    names = [one.arg for one in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
    return len([name for name in names if name not in ("self", "cls")]) + bool(given.vararg) + bool(given.kwarg)


@cache
def measured() -> dict[str, dict[str, int]]:
    """What is over each limit: list's name -> thing -> its size."""
    files = {name: len((tree.ROOT / name).read_text(encoding="utf-8").splitlines()) for name in tree.product_files()}
    everything = [pair for name in tree.product_files() for pair in functions(name)]
    lengths = {path: code_lines(node) for path, node in everything}
    counts = {path: parameters(node) for path, node in everything}
    scripts = {name: files[name] for name in tree.entry_points()}
    return {
        "LONG_FILES": {name: size for name, size in files.items() if size > LINES_OF_A_FILE},
        "LONG_FUNCTIONS": {path: size for path, size in lengths.items() if size > LINES_OF_A_FUNCTION},
        "MANY_PARAMETERS": {path: size for path, size in counts.items() if size > PARAMETERS},
        "LONG_ENTRY_POINTS": {name: size for name, size in scripts.items() if size > LINES_OF_AN_ENTRY_POINT},
    }


LISTS = {
    "LONG_FILES": LONG_FILES,
    "LONG_FUNCTIONS": LONG_FUNCTIONS,
    "MANY_PARAMETERS": MANY_PARAMETERS,
    "LONG_ENTRY_POINTS": LONG_ENTRY_POINTS,
}


@pytest.mark.parametrize("which", LISTS)
def test_nothing_is_over_its_limit_without_a_reason(which):
    over = {name: size for name, size in measured()[which].items() if name not in LISTS[which]}
    assert over == {}


@pytest.mark.parametrize("which", LISTS)
def test_the_lists_of_exceptions_name_only_what_needs_one(which):
    assert set(LISTS[which]) - set(measured()[which]) == set()
    assert all(len(reason) > 20 for reason in LISTS[which].values())
