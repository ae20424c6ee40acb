"""Which network_args a third-party module reads: what it never looks at is announced, since it will say nothing."""

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any


def unread_args(module: ModuleType, args: Iterable[str]) -> list[str]:
    """A sentence for each key that `create_network` does not read; [] where its source does not tell."""
    known = read_args(module)
    if known is None:
        return []
    found = []
    for key in args:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            found.append(f"network_args: {module.__name__} does not read {key}, so it has no effect{hint}")
    return found


def read_args(module: ModuleType) -> frozenset[str] | None:
    """The keyword arguments that a module's `create_network` reads; None when they cannot be told from its source.

    Those are its own parameters and the keys that it asks of its `**kwargs`: by get, pop or index, with `in`, or by
    looking its keys up in a table of the module. A function that hands its kwargs on as a whole cannot be told.
    """
    function = module.create_network
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if rest is None:
        return frozenset(named)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    if any(_hands_on(node, rest) for node in ast.walk(tree)):
        return None
    keys = {key for node in ast.walk(tree) for key in _keys(node, rest)}
    return frozenset(named | keys | _tables(tree, function.__globals__))


def _hands_on(node: ast.AST, rest: str) -> bool:
    if not isinstance(node, ast.Call):
        return False
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    return any(_is(value, rest) for value in given)


def _keys(node: ast.AST, rest: str) -> Iterable[str]:
    """The texts that a node looks up in the kwargs."""
    found: list[ast.expr] = []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is(node.func.value, rest):
        found = node.args[:1] if node.func.attr in ("get", "pop") else []
    elif isinstance(node, ast.Subscript) and _is(node.value, rest):
        found = [node.slice]
    elif isinstance(node, ast.Compare) and _is(node.comparators[0], rest):
        found = [node.left]
    return [entry.value for entry in found if isinstance(entry, ast.Constant) and isinstance(entry.value, str)]


def _tables(tree: ast.AST, names: Mapping[str, Any]) -> set[str]:
    """Keys of the module's tables in which the function looks something up."""
    asked = [node.comparators[0] for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    tables = [names.get(node.id) for node in asked if isinstance(node, ast.Name)]
    return {key for table in tables if isinstance(table, Mapping | set) for key in table if isinstance(key, str)}


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
