"""The effective options as TOML: shown with their origins, or written to a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from library.config.fields import Option
from library.config.run_config import SECRETS, RunConfig
from library.config.runs import RUNS
from library.config.toml_file import toml_value
from library.errors import UserError


def print_config(cfg: RunConfig, *, file: TextIO | None = None) -> None:
    """Print every option with where its value comes from; what is printed is itself a valid config file."""
    print("\n".join(config_lines(cfg)), file=file or sys.stdout)


def config_lines(cfg: RunConfig) -> Iterator[str]:
    """One section per group, one line per option; defaults are comments, since some rules ask what was given.

    What is unset, and secrets, have no value.
    """
    for key, group in RUNS[cfg.run].groups.items():
        yield f"[{key}]"
        for name, option in group.options().items():
            value = None if name in SECRETS else cfg.get(name)
            text = f"{name} = {option_toml(option, value)}" if value is not None else f"{name} ="
            if value is None or not cfg.is_given(name):
                text = f"# {text}"
            yield f"{text}  # {cfg.provenance[name]}"
        yield ""


def option_toml(option: Option, value: Any) -> str:
    """The value in the spelling in which this option is read back."""
    if option.kind == "share" and isinstance(value, float) and value == 1:
        return '"100%"'  # 1.0 would be read as a count of one
    return toml_value(value)


def write_config(cfg: RunConfig, name: str) -> Path:
    """Write the options that differ from their defaults to `name` (".toml" added when missing); never overwrites."""
    path = Path(name).expanduser()
    if path.suffix != ".toml":
        path = path.with_name(path.name + ".toml")
    lines: list[str] = []
    for key, group in RUNS[cfg.run].groups.items():
        changed = [
            f"{option} = {option_toml(details, cfg.get(option))}"
            for option, details in group.options().items()
            if cfg.get(option) != details.default and option not in SECRETS
        ]
        lines += [f"[{key}]", *changed, ""] if changed else []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8", newline="\n") as file:
            file.write("\n".join(lines))
    except FileExistsError:
        raise UserError(
            f"{path} exists already", where="output_config", fix="name a new file in config_file, or remove this one"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {os.strerror(error.errno or 0)}", where="output_config") from error
    return path
