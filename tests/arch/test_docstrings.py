"""Every public module, class and function of floors 0 to 4 says what it is for."""

import ast
from functools import cache

from tests.arch import tree
from tests.arch.test_size import Function


def is_public(name: str) -> bool:
    """Whether a name is for others: no leading underscore (dunder methods are explained by the language)."""
    return not name.startswith("_")


@cache
def classes() -> dict[str, ast.ClassDef]:
    """Every class of the project by its name."""
    found = {}
    for name in tree.product_files():
        found.update({node.name: node for node in ast.walk(tree.parse(name)) if isinstance(node, ast.ClassDef)})
    return found


def inherits_docstring(owner: ast.ClassDef, method: str) -> bool:
    """Whether a base class in the project already says what a method is for."""
    for base in owner.bases:
        parent = classes().get(ast.unparse(base).split("[")[0].split(".")[-1])
        if parent is None or parent is owner:
            continue
        documented = any(
            isinstance(node, Function) and node.name == method and ast.get_docstring(node) for node in parent.body
        )
        if documented or inherits_docstring(parent, method):
            return True
    return False


def missing_in(name: str) -> list[str]:
    """What lacks a docstring in a file, as file:line name."""
    module = tree.parse(name)
    missing = [] if ast.get_docstring(module) else [f"{name}:1 the module"]
    for node in module.body:
        if isinstance(node, (Function, ast.ClassDef)) and is_public(node.name) and not ast.get_docstring(node):
            missing.append(f"{name}:{node.lineno} {node.name}")
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            methods = [child for child in node.body if isinstance(child, Function) and is_public(child.name)]
            missing += [
                f"{name}:{method.lineno} {node.name}.{method.name}"
                for method in methods
                if not ast.get_docstring(method) and not inherits_docstring(node, method.name)
            ]
    return missing


def test_public_names_have_docstrings():
    missing = [text for name in tree.floor_files(0, 4) for text in missing_in(name)]
    assert not missing, "\n" + "\n".join(missing)


def test_scripts_and_tests_say_what_they_are():
    others = [
        name for name in tree.tracked_files() if name.endswith(".py") and ast.get_docstring(tree.parse(name)) is None
    ]
    assert others == []
