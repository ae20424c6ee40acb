"""Plugin folders: a file is a plugin, its name is its option value. Listing does not import."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from library.errors import UserError


def list_plugins(folder: Path) -> list[str]:
    """Sorted names of the Python files in `folder` that do not start with "_"; [] when the folder is missing."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("_"))


def load_plugin(package: str, name: str) -> ModuleType:
    """Import plugin `name`: a bare name inside `package`, or a dotted module path of the user's own.

    Raises UserError with the nearest name when there is no such module; an error inside the module itself passes.
    """
    if "." not in name:
        available = _plugins_of(package)
        if name not in available:
            near = difflib.get_close_matches(name, available, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"no plugin {name!r} in {package}", fix=f"{hint}available: {', '.join(available) or 'none'}"
            )
        return importlib.import_module(f"{package}.{name}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise UserError(
                f"module {name!r} cannot be imported: {error}",
                fix="check the spelling, or install the package that holds it",
            ) from error
        raise


def _plugins_of(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or []) if spec else []
    return sorted({name for location in locations for name in list_plugins(Path(location))})
