"""Keys of the dataset file: reading its tables, and checking each value where it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from library.config.data import DataOptions
from library.config.fields import path_text
from library.config.known_flags import nearest
from library.config.toml_file import TomlFile, read_text, read_toml
from library.config.values import describe, shown
from library.errors import Problem, UserError

# key of the file -> option of the run that has the same meaning, checks and default
DATASET_KEYS: dict[str, str] = {
    "batch_size": "train_batch_size",
    "resolution": "resolution",
    "resolutions": "resolutions",
    "resolution_weights": "resolution_weights",
    "enable_bucket": "enable_bucket",
    "min_bucket_reso": "min_bucket_reso",
    "max_bucket_reso": "max_bucket_reso",
    "bucket_reso_steps": "bucket_reso_steps",
    "bucket_no_upscale": "bucket_no_upscale",
    "bucket_selection": "bucket_selection",
    "bucket_max_crop": "bucket_max_crop",
    "bucket_max_upscale": "bucket_max_upscale",
    "validation_split": "validation_split",
    "validation_seed": "validation_seed",
}
SUBSET_KEYS: dict[str, str] = {
    "num_repeats": "dataset_repeats",
    "caption_extension": "caption_extension",
    "caption_separator": "caption_separator",
    "shuffle_caption": "shuffle_caption",
    "keep_tokens": "keep_tokens",
    "keep_tokens_separator": "keep_tokens_separator",
    "secondary_separator": "secondary_separator",
    "enable_wildcard": "enable_wildcard",
    "caption_prefix": "caption_prefix",
    "caption_suffix": "caption_suffix",
    "caption_dropout_rate": "caption_dropout_rate",
    "caption_dropout_every_n_epochs": "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate": "caption_tag_dropout_rate",
    "token_warmup_min": "token_warmup_min",
    "token_warmup_step": "token_warmup_step",
    "flip_aug": "flip_aug",
    "color_aug": "color_aug",
    "random_crop": "random_crop",
    "face_crop_aug_range": "face_crop_aug_range",
    "resize_interpolation": "resize_interpolation",
    "alpha_mask": "alpha_mask",
}
# keys without an option: the type each has
OWN_KEYS: dict[str, type] = {"class_tokens": str, "custom_attributes": dict}
SUBSET_ONLY_KEYS: dict[str, type] = {
    "image_dir": str,
    "metadata_file": str,
    "conditioning_data_dir": str,
    "is_reg": bool,
    "is_validation": bool,
}
PATH_KEYS = frozenset({"image_dir", "metadata_file", "conditioning_data_dir"})
_KINDS: dict[type, str] = {str: "a text in quotes", dict: "a table", bool: "true or false, without quotes"}
# keys of sd-scripts for which there is nothing to do: their type, and why
IDLE_KEYS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "cache_info": (bool, "sizes and captions are always kept in an index of each image folder"),
    "network_multiplier": ((int, float), "it changes nothing in sd-scripts either"),
}


@dataclass(frozen=True)
class Place:
    """A table of the file: what it is called, its values, how to name the line of a key, and which keys were wrong."""

    title: str
    values: dict[str, Any]
    path: tuple[str | int, ...]
    file: TomlFile
    wrong: frozenset[str] = frozenset()
    idle: tuple[str, ...] = ()

    def where(self, key: str) -> str:
        """File and line of `key`."""
        return self.file.where(*self.path, key)


@dataclass
class DatasetTables:
    """The tables of a dataset file with correct values only, and the problems of the rest."""

    general: Place
    datasets: list[tuple[Place, list[Place]]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """A sentence for each key that has no effect."""
        places = [self.general, *(place for dataset, subsets in self.datasets for place in (dataset, *subsets))]
        return [
            f"{key} has no effect: {IDLE_KEYS[key][1]} ({place.where(key)})" for place in places for key in place.idle
        ]


def read_dataset_tables(path: Path) -> DatasetTables:
    """Read and check a dataset file. Raises UserError when the file as a whole cannot be read."""
    file = _read_file(path)
    problems: list[Problem] = []
    for key in file.data:
        if key not in ("general", "datasets"):
            near = nearest(key, ("general", "datasets", *DATASET_KEYS, *SUBSET_KEYS))
            fix = "keys stand under [general], [[datasets]] or [[datasets.subsets]]"
            if near in ("general", "datasets"):
                fix = f"did you mean {near}?"
            problems.append(Problem(f"{key} cannot stand at the top level", file.where(key), fix))
    general = file.data.get("general", {})
    if not isinstance(general, dict):
        problems.append(Problem("general is not a table", file.where("general"), "write [general] on its own line"))
        general = {}
    tables = DatasetTables(_checked(Place("[general]", general, ("general",), file), problems, level="general"))
    for number, dataset in _tables(file.data, "datasets", (), file, problems):
        place = Place(f"dataset {number + 1}", dataset, ("datasets", number), file)
        subsets = [
            _checked(
                Place(f"subset {index + 1}", subset, (*place.path, "subsets", index), file), problems, level="subset"
            )
            for index, subset in _tables(dataset, "subsets", place.path, file, problems)
        ]
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        place = Place(place.title, own, place.path, file)
        tables.datasets.append((_checked(place, problems, level="dataset"), subsets))
    tables.problems = problems
    return tables


def _read_file(path: Path) -> TomlFile:
    suffix = path.suffix.lower()
    if suffix == ".toml":
        return read_toml(path, what="dataset_config")
    if suffix != ".json":
        raise UserError(f"dataset_config {path} is of no known kind", fix="name a .toml or .json file")
    try:
        data = json.loads(read_text(path, what="dataset_config"), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"this is not JSON: {error.msg}", where=f"{path} line {error.lineno}") from error
    except _GivenTwiceError as error:
        raise UserError(f"{error} is given twice", where=str(path), fix="remove one of them") from error
    if not isinstance(data, dict):
        raise UserError("the file must hold an object", where=str(path), fix='start with {"datasets": [')
    return TomlFile(name=str(path), data=data, lines={})


class _GivenTwiceError(Exception):
    """A key that a JSON object has twice."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [key for key, _ in pairs]
    for key in names:
        if names.count(key) > 1:
            raise _GivenTwiceError(key)
    return dict(pairs)


def _tables(
    parent: dict[str, Any], key: str, path: tuple[str | int, ...], file: TomlFile, problems: list[Problem]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The tables of an array, numbered from 0."""
    array = parent.get(key, [])
    if not isinstance(array, list):
        header = f"[[{'.'.join(part for part in (*path, key) if isinstance(part, str))}]]"
        problems.append(Problem(f"{key} is not an array of tables", file.where(*path, key), f"write {header}"))
        return
    for number, table in enumerate(array):
        if isinstance(table, dict):
            yield number, table
        else:
            problems.append(Problem(f"{key} holds {shown(table)}, which is not a table", file.where(*path, key)))


def _checked(place: Place, problems: list[Problem], *, level: str) -> Place:
    """The place with its correct values, normalised; the rest goes to `problems`."""
    good: dict[str, Any] = {}
    wrong: set[str] = set()
    idle: list[str] = []
    for key, value in place.values.items():
        key = resolution_key(key, value)
        found, value = _check_key(place, key, value, level=level)
        if found:
            problems.append(found)
            wrong.add(key)
        elif key in IDLE_KEYS:
            idle.append(key)
        else:
            good[key] = value
    return Place(place.title, good, place.path, place.file, frozenset(wrong), tuple(idle))


def resolution_key(key: str, value: Any) -> str:
    """`resolutions` for a `resolution` that is a list of lists; two bare numbers there are width and height."""
    is_nested = isinstance(value, list) and any(isinstance(item, list) for item in value)
    return "resolutions" if key == "resolution" and is_nested else key


def _check_key(place: Place, key: str, value: Any, *, level: str) -> tuple[Problem | None, Any]:
    where = place.where(key)
    allowed = {**SUBSET_KEYS, **({} if level == "subset" else DATASET_KEYS)}
    types = {**OWN_KEYS, **(SUBSET_ONLY_KEYS if level == "subset" else {})}
    if key in IDLE_KEYS:
        is_right = isinstance(value, IDLE_KEYS[key][0])
        return (
            None if is_right else Problem(f"{key} = {shown(value)} is of a wrong type", where, f"remove {key}")
        ), None
    if key in types:
        if isinstance(value, types[key]):
            return _check_path(key, value, where=where) if key in PATH_KEYS else (None, value)
        return Problem(f"{key} = {shown(value)} must be {_KINDS[types[key]]}", where), None
    if key in allowed:
        return check_value(key, value, option_name=allowed[key], where=where)
    if key in DATASET_KEYS or key in SUBSET_ONLY_KEYS:
        right = "[[datasets]] or [general]" if key in DATASET_KEYS else "[[datasets.subsets]]"
        return Problem(f"{key} cannot stand in {place.title}", where, f"move it to {right}"), None
    near = nearest(key, (*allowed, *types, *IDLE_KEYS))
    fix = f"did you mean {near}?" if near else f"known keys: {', '.join(sorted({*allowed, *types}))}"
    if near is None and key in DataOptions.options():
        fix = "it is an option of the run: put it on the command line or into config_file"
    return Problem(f"{key} is not a key of {place.title}", where, fix), None


def _check_path(key: str, value: Any, *, where: str) -> tuple[Problem | None, Any]:
    try:
        return None, path_text(value)
    except ValueError as error:
        return Problem(f"{key} = {shown(value)} {error}", where), None


def check_value(key: str, value: Any, *, option_name: str, where: str) -> tuple[Problem | None, Any]:
    """Check one value by the rules of the option that means the same; returns the problem, or the normalised value."""
    if key == "num_repeats" and type(value) is int and value < 1:
        return None, value  # such a subset is left out with a notice
    try:
        group = DataOptions.model_validate({option_name: value})
    except ValidationError as error:
        return describe(DataOptions.options()[option_name], error.errors()[0], value, where=where, key=key), None
    return None, getattr(group, option_name)
