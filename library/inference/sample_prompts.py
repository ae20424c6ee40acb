"""The sample prompt files of training runs: .txt, .toml, .json (gen_img.md §16). No torch."""

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.inference.prompt_line import (
    Change,
    at_least,
    finite,
    fitting,
    parse_sample_line,
    put,
    read_sampler,
    read_steps,
    set_height,
    set_width,
    warn_of_generator_syntax,
)
from library.inference.prompt_source import prompt_lines, read_text
from library.inference.request import NATIVE_SIZE, GenRequest
from library.log import get_logger
from library.sizes import Size

logger = get_logger(__name__)

_FOREIGN = "is for other models, and SDXL has no use for it"


def read_prompt_file(path: Path, *, size: Size | None = None, sampler: str = "euler_a") -> list[GenRequest]:
    """The sample pictures that a training run makes: .txt (one prompt per line), .toml or .json.

    What a prompt leaves open: size (1024x1024 when None), 30 steps, scale 7.5, the given sampler, a random seed.
    sd-scripts' defaults are 512x512 and ddim. Raises UserError naming the file and the entry.
    """
    path = Path(path)
    start = GenRequest(size=Size(*map(fitting, size or NATIVE_SIZE)), steps=30, scale=7.5, sampler=sampler)
    suffix = path.suffix.lower()
    if suffix == ".toml":
        entries = _toml_entries(path)
    elif suffix == ".json":
        entries = _json_entries(path)
    elif suffix == ".txt":
        entries = [line.text for line in prompt_lines(str(path), None)]
    else:
        raise UserError(f'"{path.suffix}" is not a kind of prompt file', str(path), "use .txt, .toml or .json")
    if not entries:
        raise UserError("the prompt file holds no prompts", str(path), "add one")
    return [
        parse_sample_line(entry, start)
        if isinstance(entry, str)
        else _from_mapping(entry, start, where=f"{path}, prompt {number}")
        for number, entry in enumerate(entries, start=1)
    ]


_KEYS: dict[str, tuple[type | tuple[type, ...], Change]] = {
    "prompt": (str, lambda request, value: replace(request, prompt=value)),
    "negative_prompt": (str, lambda request, value: replace(request, negative=value)),
    "width": (int, set_width),
    "height": (int, set_height),
    "seed": (int, put("seed", at_least(0))),
    "sample_steps": (int, put("steps", read_steps)),
    "scale": ((int, float), put("scale", finite)),
    "sample_sampler": (str, put("sampler", read_sampler)),
    "controlnet_image": (str, put("control", lambda path: (path,))),
}
_KEYS_FOREIGN = ("guidance_scale",)


def _from_mapping(entry: Mapping[str, Any], defaults: GenRequest, *, where: str) -> GenRequest:
    request = defaults
    for key, value in entry.items():
        if key in _KEYS_FOREIGN:
            logger.warning('"%s" %s; it is left out: %s', key, _FOREIGN, where)
            continue
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            fix = f'did you mean "{near[0]}"?' if near else "known: " + ", ".join(_KEYS)
            raise UserError(f'"{key}" is not known', where, fix)
        kind, change = _KEYS[key]
        try:
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"has the wrong type ({type(value).__name__})")
            request = change(request, value)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f'"{key}" = {value!r} {error}', where) from None
    if "prompt" not in entry:
        raise UserError('"prompt" is missing', where, 'add prompt = "…"')
    warn_of_generator_syntax(request.prompt)
    return replace(request, raw=request.prompt)


def _toml_entries(path: Path) -> list[Mapping[str, Any]]:
    """[prompt] holds shared keys and an array of tables `subset`; a key of a subset wins over the shared one."""
    try:
        data = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"the file is not valid TOML: {error}", str(path)) from None
    table = data.get("prompt")
    if not isinstance(table, dict) or set(data) != {"prompt"}:
        raise UserError("the file must hold one table [prompt]", str(path), "see docs/options.md, sample_prompts")
    shared = {key: value for key, value in table.items() if key != "subset"}
    subsets = table.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError("subset must be an array of tables", str(path), "write [[prompt.subset]]")
    return [shared | subset for subset in subsets]


def _json_entries(path: Path) -> list[Any]:
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"the file is not valid JSON: {error}", str(path)) from None
    if not isinstance(data, list) or not all(isinstance(entry, dict | str) for entry in data):
        raise UserError("the file must hold a list of objects or of prompt lines", str(path))
    return data
