"""The source tree as the architecture tests see it: files, floors, imports; read with ast, never imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]

# Floor, then what is on it. Entries of one tuple are siblings: none imports another, except inside one entry.
FLOORS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("library.errors", "library.log", "library.seeds", "library.plugins", "library.sizes", "library.config"),),
    (("library.diffusion",), ("library.io",)),
    (("library.models",), ("library.data",), ("networks",)),
    (("library.inference",),),
    (("library.training",),),
    (("tools",), ("",)),  # "" are the entry points in the repository's own folder
)


@dataclass(frozen=True)
class Import:
    """One imported module name, absolute, with the line it stands on."""

    module: str
    line: int


@cache
def tracked_files() -> tuple[str, ...]:
    """Posix paths of everything that is or would be committed; without git, of what a source archive holds."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        names = result.stdout.splitlines()
    else:
        hidden = {".venv", "__pycache__", ".git"}
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [path.as_posix() for path in paths if not hidden & set(path.parts)]
    return tuple(sorted(name for name in set(names) if (ROOT / name).is_file()))


def product_files() -> list[str]:
    """Every Python file but the tests."""
    return [name for name in tracked_files() if name.endswith(".py") and not name.startswith("tests/")]


def floor_files(lowest: int, highest: int) -> list[str]:
    """Python files of the floors `lowest` to `highest`, both included."""
    return [
        name for name in product_files() if (place := place_of(module_name(name))) and lowest <= place[0] <= highest
    ]


def entry_points() -> list[str]:
    """Every script that users start: those in the repository's folder and in tools/, but not tools' packages."""
    return [
        name for name in product_files() if PurePosixPath(name).parent.as_posix() in (".", "tools") and is_script(name)
    ]


def is_script(name: str) -> bool:
    """Whether a file does something when it is started."""
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in parse(name).body)


@cache
def parse(name: str) -> ast.Module:
    """Syntax tree of a tracked file."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


def module_name(name: str) -> str:
    """`library/io/images.py` -> `library.io.images`; a package's `__init__.py` -> the package."""
    parts = PurePosixPath(name).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, str]:
    """Module name -> file of all product code."""
    return {module_name(name): name for name in product_files()}


def place_of(module: str) -> tuple[int, int] | None:
    """(floor, sibling) of a module, or None when it is on no floor (other people's code, benchmarks)."""
    for floor, siblings in enumerate(FLOORS):
        for sibling, prefixes in enumerate(siblings):
            if any(prefix and (module == prefix or module.startswith(prefix + ".")) for prefix in prefixes):
                return floor, sibling
    return (len(FLOORS) - 1, 1) if f"{module}.py" in product_files() else None


def imports_of(name: str) -> Iterator[Import]:
    """Every import of a file: at the top, inside functions, under TYPE_CHECKING, and import_module("literal")."""
    package = module_name(name).split(".")
    if not name.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                whole = f"{origin}.{alias.name}" if origin else alias.name
                yield Import(whole if whole in modules() else origin, node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "load_plugin")):
            first = node.args[0] if node.args else None
            named = isinstance(first, ast.Constant) and isinstance(first.value, str)
            if named and (is_ours(first.value) or ast.unparse(node.func).endswith("import_module")):
                yield Import(first.value, node.lineno)


def is_ours(module: str) -> bool:
    """Whether a module is part of this project."""
    return module.split(".")[0] in {name.split(".")[0] for name in modules()}


def third_party(name: str) -> set[str]:
    """Top-level packages from elsewhere that a file imports, the standard library left out."""
    tops = {found.module.split(".")[0] for found in imports_of(name) if not is_ours(found.module)}
    return tops - set(sys.stdlib_module_names) - {"__future__"}
