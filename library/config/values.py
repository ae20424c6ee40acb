"""From raw values to validated groups: pydantic's errors become sentences with file and line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from library.config.fields import Group, Option
from library.config.run_config import DEFAULT, RunConfig
from library.config.runs import Run
from library.config.toml_file import toml_value
from library.errors import Problem
from library.sizes import Size

_TYPE_SENTENCES = {
    "bool": "must be true or false, without quotes",
    "int": "must be a whole number",
    "float": "must be a number",
    "str": "must be a text in quotes",
    "share": "must be a number",
    "size": "must be a resolution",
    "span": "must be two numbers",
}


@dataclass(frozen=True)
class Given:
    """A raw value and the place it comes from."""

    value: Any
    where: str


def build_config(run: Run, given: Mapping[str, Given]) -> tuple[RunConfig, dict[str, list[Problem]]]:
    """Validate every group; wrong values are left at their defaults and reported by option name."""
    problems: dict[str, list[Problem]] = {}
    groups: dict[str, Group] = {}
    provenance = {name: given[name].where if name in given else DEFAULT for name in run.options()}
    for key, group in run.groups.items():
        raw = {name: given[name].value for name in group.options() if name in given}
        try:
            groups[key] = group.model_validate(raw)
        except ValidationError as error:
            for details in error.errors():
                name = str(details["loc"][0])
                problem = describe(group.options()[name], details, given[name].value, where=given[name].where)
                if problem not in problems.setdefault(name, []):
                    problems[name].append(problem)
            groups[key] = group.model_validate({name: value for name, value in raw.items() if name not in problems})
    return RunConfig(run.name, groups=groups, provenance=provenance, notices=[]), problems


def describe(option: Option, details: ErrorDetails, value: Any, *, where: str, key: str = "") -> Problem:
    """One pydantic error as a sentence; `key` is the name the user wrote when it is not the option's own."""
    key = key or option.name
    return Problem(f"{key} = {shown(value)} {_sentence(option, details)}", where, _fix(option, value, key=key))


def _sentence(option: Option, details: ErrorDetails) -> str:
    limits = details.get("ctx", {})
    match details["type"]:
        case "greater_than_equal":
            return f"must be at least {limits['ge']:g}"
        case "greater_than":
            return f"must be greater than {limits['gt']:g}"
        case "less_than_equal":
            return f"must be at most {limits['le']:g}"
        case "less_than":
            return f"must be less than {limits['lt']:g}"
        case "finite_number":
            return "must be a finite number"
        case "value_error":
            return str(limits["error"])
    if option.many:
        items = "texts in quotes" if option.kind == "str" else "numbers"
        return f"must be an array of {items}, in square brackets"
    return _TYPE_SENTENCES[option.kind]


def _fix(option: Option, value: Any, *, key: str) -> str:
    if isinstance(value, str) and option.kind in ("int", "float", "bool") and _looks_like(option.kind, value):
        return f"remove the quotes: {key} = {value.strip().lower()}"
    if option.many and isinstance(value, str):
        return f"{key} = [{', '.join(toml_value(part) for part in value.split())}]"
    return f"the default is {key} = {toml_value(option.default)}" if option.default not in (None, (), "") else ""


def _looks_like(kind: str, text: str) -> bool:
    if kind == "bool":
        return text.strip().lower() in ("true", "false")
    try:
        float(text)
    except ValueError:
        return False
    return True


def shown(value: Any) -> str:
    """A value as the user would write it, shortened."""
    items = value if isinstance(value, (list, tuple)) and not isinstance(value, Size) else [value]
    writable = all(isinstance(item, (bool, int, float, str, Size)) for item in items)
    text = toml_value(value) if writable else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
