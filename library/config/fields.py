"""What an option is: one pydantic field carries the flag, the TOML key, the help text, the choices and the runs.

Every other file of this package reads options through `Option`; nothing about a flag is written down twice.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationInfo, field_validator

from library.config.spans import Span, parse_span
from library.sizes import Size, parse_resolution

NETWORK = frozenset({"sdxl_train_network"})
FULL = frozenset({"sdxl_train"})
LLLITE = frozenset({"sdxl_train_control_net_lllite"})
TOKENS = frozenset({"sdxl_train_textual_inversion"})
TRAINER = NETWORK | FULL | TOKENS | LLLITE
LATENTS = frozenset({"cache_latents"})
TEXTS = frozenset({"cache_text_encoder_outputs"})
GENERATOR = frozenset({"sdxl_gen_img"})
ADMIN = frozenset({"cache_admin"})
REPORT = frozenset({"dataset_report"})
SHARED = TRAINER | LATENTS | TEXTS
EVERY_RUN = SHARED | GENERATOR | ADMIN | REPORT

SizeValue = Annotated[Size, InstanceOf()]
SpanValue = Annotated[Span, InstanceOf()]
_KINDS: dict[Any, str] = {bool: "bool", int: "int", float: "float", str: "str", Size: "size", Span: "span"}


@dataclass(frozen=True)
class Option:
    """One option as read from its pydantic field.

    kind: "bool", "int", "float", "str", "size" (a resolution), "span" (two numbers, low and
    high) or "share" (a whole number, or a share of the whole).
    `later`: values that sd-scripts knows and this suite not yet. `zero_is_unset`: 0 and below stand for the default.
    `acts`: the runs in which the option has an effect; other runs may accept it because they share a TOML file.
    """

    name: str
    kind: str
    many: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    later: tuple[str, ...]
    is_path: bool
    zero_is_unset: bool
    aliases: tuple[str, ...]
    acts: frozenset[str]

    @property
    def is_free_text(self) -> bool:
        """Whether any text at all is a meaningful value."""
        return self.kind == "str" and not self.choices and not self.is_path

    @property
    def negation(self) -> str:
        """The name of the flag that switches it off again: no_x for x, and x for no_x."""
        return self.name.removeprefix("no_") if self.name.startswith("no_") else f"no_{self.name}"


def option(
    default: Any,
    help: str,  # the word that argparse uses
    *,
    choices: Iterable[str] = (),
    later: Iterable[str] = (),
    path: bool = False,
    zero_is_unset: bool = False,
    aliases: Iterable[str] = (),
    acts: frozenset[str] | None = None,
    **limits: Any,
) -> Any:
    """A pydantic field with everything that the command line and the documents need; `limits` are ge, gt, le, lt."""
    extra: dict[str, Any] = {
        "choices": tuple(choices),
        "later": tuple(later),
        "path": path,
        "zero_is_unset": zero_is_unset,
        "aliases": tuple(aliases),
        "acts": acts,
    }
    return Field(default=default, description=help, json_schema_extra=extra, **limits)


class Group(BaseModel):
    """Options that belong together; immutable, strict about types, lenient about the usual spellings."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    title: ClassVar[str] = ""
    acts: ClassVar[frozenset[str]] = TRAINER

    @classmethod
    @functools.cache
    def options(cls) -> dict[str, Option]:
        """The options by name; those of a base class come last."""
        own = [name for name in cls.model_fields if name in cls.__annotations__]
        inherited = [name for name in cls.model_fields if name not in cls.__annotations__]
        return {name: _read_option(cls, name) for name in own + inherited}

    @field_validator("*", mode="before")
    @classmethod
    def _accept_usual_spellings(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return normalise(cls.options()[info.field_name], value)


def _read_option(group: type[Group], name: str) -> Option:
    field = group.model_fields[name]
    extra = field.json_schema_extra
    assert isinstance(extra, dict), f"{name} is not declared with option()"
    kind, many = _kind(field.annotation)
    details: dict[str, Any] = dict(extra)
    return Option(
        name=name,
        kind=kind,
        many=many,
        default=field.default,
        help=field.description or "",
        choices=details["choices"],
        later=details["later"],
        is_path=details["path"],
        zero_is_unset=details["zero_is_unset"],
        aliases=details["aliases"],
        acts=details["acts"] if details["acts"] is not None else group.acts,
    )


def _kind(annotation: Any) -> tuple[str, bool]:
    """The kind of value that an annotation stands for, and whether it is a tuple of them."""
    if get_origin(annotation) is tuple:
        return _kind(get_args(annotation)[0])[0], True
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return _kind(members[0])
        assert set(members) == {int, float}, f"no option kind for {annotation}"
        return "share", False
    return _KINDS[annotation], False


def normalise(option: Option, value: Any) -> Any:
    """The value in its one internal spelling; types that are wrong pass through for pydantic to refuse.

    An empty text (and "None" where no text is meant) stands for the default, since TOML has no null. Raises
    ValueError for a value of the right type that does not exist.
    """
    if value is None or _stands_for_unset(option, value):
        return option.default
    if option.many:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if option.kind == "str" and not isinstance(value, (list, tuple)):
            return value
        return tuple(_normalise_item(option, item) for item in items)
    return _normalise_item(option, value)


def _stands_for_unset(option: Option, value: Any) -> bool:
    if not isinstance(value, str):
        return option.zero_is_unset and type(value) in (int, float) and value <= 0
    return (value == "" and option.default in (None, ())) or (
        value in ("", "None", "none") and not option.is_free_text and value not in option.choices
    )


def _normalise_item(option: Option, value: Any) -> Any:
    if option.kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    if option.kind == "size":
        return value if isinstance(value, Size) else parse_resolution(value)
    if option.kind == "span":
        return value if isinstance(value, Span) else parse_span(value)
    if option.kind == "share":
        return parse_share(value)
    if option.is_path and isinstance(value, (str, os.PathLike)):
        return path_text(value)
    if option.choices and isinstance(value, str) and value not in option.choices:
        raise ValueError(_not_a_choice(option, value))
    return value


def path_text(value: str | os.PathLike[str]) -> str:
    """A path with "~" replaced. Raises ValueError for control characters, which "C:\\train" in TOML would bring in."""
    text = os.fspath(value)
    if any(ord(character) < 32 for character in text):
        raise ValueError(r"holds a control character: a backslash needs single quotes, as in 'C:\train', or write /")
    return os.path.expanduser(text)


def _not_a_choice(option: Option, value: str) -> str:
    known = ", ".join(option.choices)
    if value in option.later:
        return f"is not supported yet; available: {known}"
    return f"is not one of: {known}"


def parse_share(value: object) -> int | float:
    """Read a count or a share: 100 and 1.0 are counts, 0.1 and "10%" are shares of the whole ("100%" is 1.0).

    Returns an int for a count and a float in (0, 1] for a share. Raises ValueError.
    """
    hint = 'must be a whole number, a share below 1, or a percentage such as "10%"'
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(hint)
    is_percentage = isinstance(value, str) and value.strip().endswith("%")
    try:
        number = float(value.strip().rstrip("%")) if isinstance(value, str) else float(value)
    except ValueError:
        raise ValueError(hint) from None
    if is_percentage:
        if not 0 <= number <= 100:
            raise ValueError("must lie between 0% and 100%")
        return number / 100 if number > 0 else 0
    if number < 0 or number != number or number == float("inf"):
        raise ValueError(hint)
    if 0 < number < 1:
        return number
    if not number.is_integer():
        raise ValueError(hint)
    return int(number)
