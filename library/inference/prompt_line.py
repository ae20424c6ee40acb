"""One picture to make, and the prompt lines and prompt files that ask for it (gen_img.md §3 and §16). No torch."""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.log import get_logger
from library.sizes import Size

logger = get_logger(__name__)

CELL = 8  # pixels per latent cell, each way
SMALLEST_SIDE = 64
MAX_STEPS = 1000
NATIVE_SIZE = Size(1024, 1024)  # what SDXL was trained at
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class GenRequest:
    """One picture: what, how large, how.

    seed None: a random one. original_*, crop_* are the size ids that the model is told, None meaning the output size
    and 0; original_*_negative those of the negative branch, None meaning the positive branch's. eta None: the
    sampler's own. negative_scale None: plain guidance (guidance.Guidance). network_muls: the
    strengths of the networks, None meaning as loaded. control: paths of the control images. seeds: what `--d` gave for
    the pictures of this prompt. raw: the whole line.
    """

    prompt: str = ""
    negative: str = ""
    size: Size = NATIVE_SIZE
    steps: int = 50
    scale: float = 7.5
    seed: int | None = None
    sampler: str = "ddim"
    eta: float | None = None
    negative_scale: float | None = None
    guidance_rescale: float = 0.0
    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None
    network_muls: tuple[float, ...] | None = None
    control: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    raw: str = ""

    def size_ids(self, *, negative: bool = False) -> tuple[int, int, int, int, int, int]:
        """(original h, original w, crop top, crop left, target h, target w) of one branch."""
        original_w, original_h = self.original_width or self.size.w, self.original_height or self.size.h
        if negative:
            original_w = self.original_width_negative or original_w
            original_h = self.original_height_negative or original_h
        return (original_h, original_w, self.crop_top or 0, self.crop_left or 0, self.size.h, self.size.w)


def parse_line(line: str, defaults: GenRequest) -> GenRequest:
    """The request of a generator's prompt line, such as `a red cat --w 768 --n blurry --d 1`.

    Options that are not known, not supported yet or not readable are named in a warning and change nothing.
    """
    return _parse(line, defaults, _GENERATOR_OPTIONS, _GENERATOR_LATER)


def parse_sample_line(line: str, defaults: GenRequest) -> GenRequest:
    """The request of a line of a training run's sample prompt file; its options differ from the generator's."""
    return _parse(line, defaults, _SAMPLE_OPTIONS, _SAMPLE_LATER)


def read_lines(path: Path) -> list[str]:
    """The prompt lines of a UTF-8 text file, without blank lines and lines that start with #.

    Raises UserError when the file cannot be read or holds none.
    """
    lines = [line.strip() for line in _read_text(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError("the prompt file holds no prompts", str(path), "write one prompt per line")
    return lines


def read_prompt_file(path: Path, *, size: Size | None = None, sampler: str = "euler_a") -> list[GenRequest]:
    """The sample pictures that a training run makes: .txt (one prompt per line), .toml or .json.

    What a prompt leaves open: size (1024x1024 when None), 30 steps, scale 7.5, the given sampler, a random seed.
    sd-scripts' defaults are 512x512 and ddim. Raises UserError naming the file and the entry.
    """
    path = Path(path)
    start = GenRequest(size=_fitting(size or NATIVE_SIZE), steps=30, scale=7.5, sampler=sampler)
    suffix = path.suffix.lower()
    if suffix == ".toml":
        entries = _toml_entries(path)
    elif suffix == ".json":
        entries = _json_entries(path)
    elif suffix == ".txt":
        entries = read_lines(path)
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


# --- options of a line -------------------------------------------------------------------------------------------

Change = Callable[[GenRequest, str], GenRequest]
_WHOLE, _FLOAT, _TEXT = r"-?\d+", r"-?\d*\.?\d+(?:e-?\d+)?", r".+"


def _put(field: str, convert: Callable[[str], Any]) -> Change:
    def change(request: GenRequest, value: str) -> GenRequest:
        return replace(request, **{field: convert(value)})

    return change


def _at_least(lowest: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise ValueError(f"must be {lowest} or more")
        return value

    return convert


def _width(request: GenRequest, value: str) -> GenRequest:
    return replace(request, size=_fitting(Size(_at_least(1)(value), request.size.h)))


def _height(request: GenRequest, value: str) -> GenRequest:
    return replace(request, size=_fitting(Size(request.size.w, _at_least(1)(value))))


def _fitting(size: Size) -> Size:
    """The size in whole latent cells, rounded down, at least 64."""
    w, h = (max(SMALLEST_SIDE, side // CELL * CELL) for side in size)
    if (w, h) != tuple(size):
        logger.warning("%dx%d is not a possible picture size: taking %dx%d", size.w, size.h, w, h)
    return Size(w, h)


def _seeds(request: GenRequest, value: str) -> GenRequest:
    seeds = tuple(int(part) for part in value.split(",") if part)
    return replace(request, seed=seeds[0], seeds=seeds)


def _muls(request: GenRequest, value: str) -> GenRequest:
    return replace(request, network_muls=tuple(float(part) for part in value.split(",") if part))


def _steps(text: str) -> int:
    return min(max(int(text), 1), MAX_STEPS)


def _sampler(text: str) -> str:
    from library.config.choices import SAMPLERS

    if text not in SAMPLERS:
        raise ValueError("must be one of " + ", ".join(SAMPLERS))
    return text


# name -> (what a value looks like; text after it is ignored), (what it changes)
_GENERATOR_OPTIONS: dict[str, tuple[str, Change]] = {
    "w": (_WHOLE, _width),
    "h": (_WHOLE, _height),
    "ow": (_WHOLE, _put("original_width", _at_least(1))),
    "oh": (_WHOLE, _put("original_height", _at_least(1))),
    "nw": (_WHOLE, _put("original_width_negative", _at_least(1))),
    "nh": (_WHOLE, _put("original_height_negative", _at_least(1))),
    "ct": (_WHOLE, _put("crop_top", int)),
    "cl": (_WHOLE, _put("crop_left", int)),
    "s": (_WHOLE, _put("steps", _steps)),
    "d": (r"\d[\d,]*", _seeds),
    "l": (_FLOAT, _put("scale", float)),
    "n": (_TEXT, _put("negative", str)),
    "am": (r"[-\d.,e]+", _muls),
}
_LATER = "is not supported yet"
_FOREIGN = "is for other models, and SDXL has no use for it"
_GENERATOR_LATER = dict.fromkeys(
    ("nl", "t", "c", "f", "dsd1", "dst1", "dsd2", "dst2", "dsr", "glt", "glr", "gle", "gls", "glsn", "glus"), _LATER
)
_SAMPLE_OPTIONS = {name: _GENERATOR_OPTIONS[name] for name in ("w", "h", "d", "s", "l", "n")}
_SAMPLE_OPTIONS["cn"] = (_TEXT, _put("control", lambda path: (path.strip(),)))
_SAMPLE_OPTIONS["ss"] = (r"\S+", _put("sampler", _sampler))
_SAMPLE_LATER = dict.fromkeys(("g", "ctr", "rcfg", "fs"), _FOREIGN)


def _parse(
    line: str, defaults: GenRequest, options: Mapping[str, tuple[str, Change]], later: Mapping[str, str]
) -> GenRequest:
    prompt, *pieces = f" {line.strip()}".split(" --")
    request = replace(defaults, prompt=prompt.strip(), raw=line.strip())
    for piece in pieces:
        name, _, value = piece.strip().partition(" ")
        key = name.lower()
        if key in later:
            logger.warning("--%s in a prompt %s; it is left out: %s", name, later[key], line)
            continue
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f" (did you mean --{near[0]}?)" if near else ""
            logger.warning("--%s in a prompt is not known%s; it is left out: %s", name, hint, line)
            continue
        pattern, change = options[key]
        match = re.match(pattern, value.strip(), re.IGNORECASE)
        try:
            if match is None:
                raise ValueError("is not readable")
            request = change(request, match[0])
        except (ValueError, OverflowError) as error:
            logger.warning("--%s %s: the value %s; it is left out: %s", name, value.strip(), error, line)
    _warn_of_later_syntax(request.prompt)
    return request


def _warn_of_later_syntax(prompt: str) -> None:
    if re.search(r"\{[^{}]*\|[^{}]*\}", prompt):
        logger.warning("{a|b} choices in prompts are not supported yet; they are drawn as text: %s", prompt)
    if " AND " in prompt:
        logger.warning("AND between sub-prompts is not supported yet; it is drawn as text: %s", prompt)


# --- prompt files of training runs -------------------------------------------------------------------------------

_KEYS: dict[str, tuple[type | tuple[type, ...], Change]] = {
    "prompt": (str, lambda request, value: replace(request, prompt=value)),
    "negative_prompt": (str, lambda request, value: replace(request, negative=value)),
    "width": (int, _width),
    "height": (int, _height),
    "seed": (int, _put("seed", _at_least(0))),
    "sample_steps": (int, _put("steps", _steps)),
    "scale": ((int, float), _put("scale", float)),
    "sample_sampler": (str, _put("sampler", _sampler)),
    "controlnet_image": (str, _put("control", lambda path: (path,))),
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
    _warn_of_later_syntax(request.prompt)
    return replace(request, raw=request.prompt)


def _toml_entries(path: Path) -> list[Mapping[str, Any]]:
    """[prompt] holds shared keys and an array of tables `subset`; a key of a subset wins over the shared one."""
    try:
        data = tomllib.loads(_read_text(path))
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
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"the file is not valid JSON: {error}", str(path)) from None
    if not isinstance(data, list) or not all(isinstance(entry, dict | str) for entry in data):
        raise UserError("the file must hold a list of objects or of prompt lines", str(path))
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("the prompt file does not exist", str(path), "check the path") from None
    except OSError as error:
        raise UserError(f"the prompt file cannot be read ({error.strerror})", str(path)) from None
    except UnicodeDecodeError:
        raise UserError("the prompt file is not UTF-8", str(path), "save it as UTF-8") from None
