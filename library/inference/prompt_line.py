"""The prompt lines that ask for pictures, and their options (gen_img.md §3 and §16). No torch."""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from library.errors import Problem, UserError
from library.inference.effect_options import EFFECT_OPTIONS, effects_that_cannot_act
from library.inference.prompt_source import PromptLine
from library.inference.request import AND, CELL, MAX_SIDE, MAX_STEPS, SEED_END, SMALLEST_SIDE, GenRequest, split_and
from library.log import get_logger
from library.sizes import Size

logger = get_logger(__name__)


def parse_line(line: PromptLine | str, defaults: GenRequest, *, regions: int = 0) -> GenRequest:
    """The request of a generator's prompt line, such as `a red cat --w 768 --n blurry --d 1`.

    Braces and `__name__` are text here (dynamic_prompts.py chooses before). regions: how many networks there are that
    act in parts of the picture. Raises UserError, with a caret under each place, for options that are not known, cannot
    act or cannot be read, for AND without such networks, and for fewer sub-prompts than there are of them.
    """
    source = line if isinstance(line, PromptLine) else PromptLine(line)
    request, problems = _parse(source, defaults, _GENERATOR_OPTIONS, _GENERATOR_REFUSED)
    problems += _without_effect(source, request, regions)
    if problems:
        raise UserError.from_problems(problems)
    return request


def parse_sample_line(line: str, defaults: GenRequest) -> GenRequest:
    """The request of a line of a training run's sample prompt file; its options differ from the generator's.

    Training goes on whatever the line says: what has no effect is named in a warning and left out.
    """
    request, problems = _parse(PromptLine(line), defaults, _SAMPLE_OPTIONS, _SAMPLE_REFUSED)
    for problem in problems:
        logger.warning("%s%s; it is left out: %s", problem.what, f" ({problem.fix})" if problem.fix else "", line)
    warn_of_generator_syntax(request.prompt)
    return request


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds of a line's last readable `--d`, wherever it stands; () when there is none."""
    found = re.findall(r"(?:^| )--d +(\d+(?:,\s*\d+)*)(?=[\s,]|$)", text, re.IGNORECASE)
    return tuple(int(part[:20]) for part in found[-1].split(",")) if found else ()


# --- options of a line -------------------------------------------------------------------------------------------

Change = Callable[[GenRequest, str], GenRequest]
_WHOLE, _FLOAT, _TEXT = r"[+-]?\d+", r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", r".+"
_OTHER_PICTURES = (".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl")


def put(field: str, convert: Callable[[str], Any]) -> Change:
    """A change of one field to what `convert` reads."""

    def change(request: GenRequest, value: str) -> GenRequest:
        return replace(request, **{field: convert(value)})

    return change


def at_least(lowest: int) -> Callable[[str], int]:
    """A reader of whole numbers; ValueError below `lowest`."""

    def convert(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise ValueError(f"must be {lowest} or more")
        return value

    return convert


def set_width(request: GenRequest, value: str) -> GenRequest:
    """The request with another width, in whole latent cells."""
    return replace(request, size=Size(fitting(at_least(1)(value)), request.size.h))


def set_height(request: GenRequest, value: str) -> GenRequest:
    """The request with another height, in whole latent cells."""
    return replace(request, size=Size(request.size.w, fitting(at_least(1)(value))))


def fitting(side: int) -> int:
    """A side in whole latent cells, rounded down, at least 64 pixels; ValueError above 32768."""
    if side > MAX_SIDE:
        raise ValueError(f"must be {MAX_SIDE} or less")
    fits = max(SMALLEST_SIDE, side // CELL * CELL)
    if fits != side:
        logger.warning("no side of a picture can have %d pixels: taking %d", side, fits)
    return fits


def _seeds(request: GenRequest, value: str) -> GenRequest:
    seeds = tuple(int(part) for part in value.split(",") if part.strip())
    if max(seeds) >= SEED_END:
        raise ValueError("must be below 2^63")
    return replace(request, seed=seeds[0], seeds=seeds)


def _muls(request: GenRequest, value: str) -> GenRequest:
    return replace(request, network_muls=tuple(finite(part) for part in value.split(",") if part.strip()))


def finite(text: str) -> float:
    """A number; ValueError for one that is too large to compute with."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("is too large")
    return value


def read_steps(text: str) -> int:
    """A number of steps, at least 1 and at most 1000."""
    return min(max(int(text), 1), MAX_STEPS)


def read_sampler(text: str) -> str:
    """The name of a sampler; ValueError names them all."""
    from library.config.choices import SAMPLERS

    if text not in SAMPLERS:
        raise ValueError("must be one of " + ", ".join(SAMPLERS))
    return text


def _strength(text: str) -> float:
    value = finite(text)
    if not 0 < value <= 1:
        raise ValueError("must be above 0 and at most 1")
    return value


def _negative_scale(text: str) -> float | None:
    return None if text.lower() == "none" else finite(text)


def _file_name(text: str) -> str:
    name = text.strip()
    if any(letter in '/\\:*?"<>|' or not letter.isprintable() for letter in name):
        raise ValueError("must be a file's name without a folder")
    if name.lower().endswith(_OTHER_PICTURES):
        raise ValueError("must end in .png, .webp, .jpg or .jpeg, or in nothing")
    if name.strip(".") == "" or len(name.encode(errors="replace")) > 200:
        raise ValueError("cannot be a file's name")
    return name


# name -> (what a value looks like; text after it is ignored), (what it changes)
_GENERATOR_OPTIONS: dict[str, tuple[str, Change]] = {
    "w": (_WHOLE, set_width),
    "h": (_WHOLE, set_height),
    "ow": (_WHOLE, put("original_width", at_least(1))),
    "oh": (_WHOLE, put("original_height", at_least(1))),
    "nw": (_WHOLE, put("original_width_negative", at_least(1))),
    "nh": (_WHOLE, put("original_height_negative", at_least(1))),
    "ct": (_WHOLE, put("crop_top", int)),
    "cl": (_WHOLE, put("crop_left", int)),
    "s": (_WHOLE, put("steps", read_steps)),
    "d": (r"\d+(?:,\s*\d+)*,?", _seeds),
    "l": (_FLOAT, put("scale", finite)),
    "t": (_FLOAT, put("strength", _strength)),
    "nl": (rf"none|{_FLOAT}", put("negative_scale", _negative_scale)),
    "n": (_TEXT, put("negative", str)),
    "c": (_TEXT, put("clip_prompt", str)),
    "f": (_TEXT, put("name", _file_name)),
    "am": (rf"{_FLOAT}(?:,\s*{_FLOAT})*,?", _muls),
    **EFFECT_OPTIONS,
}
_FOREIGN = "is for other models, and SDXL has no use for it"
_SAMPLES_ONLY = "is an option of the sample prompts of training"
_GENERATOR_REFUSED = {
    "ss": f"{_SAMPLES_ONLY}; here --sampler of the command line sets it",
    "cn": f"{_SAMPLES_ONLY}; here --guide_image_path of the command line names them",
    **dict.fromkeys(("g", "ctr", "rcfg", "fs"), _FOREIGN),
}
_SAMPLE_OPTIONS = {name: _GENERATOR_OPTIONS[name] for name in ("w", "h", "d", "s", "l", "n")}
_SAMPLE_OPTIONS["cn"] = (_TEXT, put("control", lambda path: (path.strip(),)))
_SAMPLE_OPTIONS["ss"] = (r"\S+", put("sampler", read_sampler))
_SAMPLE_REFUSED = dict.fromkeys(("g", "ctr", "rcfg", "fs"), _FOREIGN)
_LONG_NAMES = {
    "width": "w", "height": "h", "size": "w", "steps": "s", "seed": "d", "scale": "l", "cfg": "l", "negative": "n",
    "neg": "n", "no": "n", "negative_prompt": "n", "negative_scale": "nl", "name": "f", "file": "f",
    "network_mul": "am", "crop_top": "ct", "crop_left": "cl", "original_width": "ow", "original_height": "oh",
}  # fmt: skip


@dataclass(frozen=True)
class _Piece:
    """One `--name value` of a line; the places are those of the line."""

    name: str
    value: str
    name_at: int
    value_at: int


def _pieces(text: str) -> tuple[str, list[_Piece]]:
    """The prompt and what follows it, cut before every "--" that begins the line or follows a space."""
    starts = [match.end() for match in re.finditer(r"(?:^| )--", text)]
    if not starts:
        return text.strip(), []
    ends = [match.start() for match in re.finditer(r"(?:^| )--", text)]
    pieces = []
    for start, end in zip(starts, [*ends[1:], len(text)], strict=True):
        match = re.compile(r"\s*(\S*)\s*(.*?)\s*", re.DOTALL).fullmatch(text, start, end)
        assert match is not None  # every part of it may be empty
        pieces.append(_Piece(match[1], match[2], match.start(1), match.start(2)))
    return text[: ends[0]].strip(), pieces


def _parse(
    source: PromptLine, defaults: GenRequest, options: Mapping[str, tuple[str, Change]], refused: Mapping[str, str]
) -> tuple[GenRequest, list[Problem]]:
    """The request of what can be read of a line, and the problems with the rest."""
    source = replace(source, text=source.text.strip())
    prompt, pieces = _pieces(source.text)
    request, problems = replace(defaults, prompt=prompt, raw=source.text), []
    for piece in pieces:
        key, start, end = piece.name.lower(), piece.name_at - 2, piece.value_at + len(piece.value)
        if key in refused:
            problems.append(source.problem(f"--{piece.name} in a prompt {refused[key]}", start, end, fix="remove it"))
        elif key not in options:
            what = f"--{piece.name} in a prompt is not known"
            fix = _suggestion(key, options)
            problems.append(source.problem(what, max(0, start), piece.name_at + len(piece.name), fix=fix))
        else:
            pattern, change = options[key]
            try:
                request = change(request, _value(piece, pattern))
            except (ValueError, OverflowError) as error:
                what = f"--{piece.name} {piece.value}".rstrip() + f": the value {_reason(error)}"
                problems.append(source.problem(what, piece.value_at, end))
    return request, problems


def _value(piece: _Piece, pattern: str) -> str:
    """The start of a value that an option reads; ValueError when it cannot be read. What follows it is announced."""
    match = re.compile(pattern, re.IGNORECASE | re.DOTALL).match(piece.value)
    rest = piece.value[match.end() :] if match else ""
    if match is None or re.match(r"[\w.+-]", rest):
        raise ValueError("is not readable" if piece.value else "is missing")
    if rest.strip(" ,"):
        logger.warning('--%s %s: "%s" after the value is not read', piece.name, match[0], rest.strip())
    return match[0]


def _reason(error: Exception) -> str:
    text = str(error)
    return "is too long" if "digit" in text else text  # Python converts 4300 digits at most


def _suggestion(key: str, options: Mapping[str, Any]) -> str:
    if not re.match(r"[^\W_]", key):
        return "two dashes after a space begin an option: join them to the word, or write one dash"
    near = difflib.get_close_matches(key, options, n=1)
    guess = _LONG_NAMES.get(key) or (near[0] if near else "")
    return f"did you mean --{guess}?" if guess in options else "known: " + ", ".join(f"--{name}" for name in options)


def _without_effect(source: PromptLine, request: GenRequest, regions: int) -> Iterator[Problem]:
    """What is understood but cannot act."""
    text = source.text.strip()
    shown = replace(source, text=text)
    parts = len(split_and(request.prompt))
    if parts > 1 and not regions:
        place = text.index(AND) + 1
        what = "AND gives networks prompts of their own in parts of a picture, and there are none that do so"
        fix = 'write a comma, or "and" in small letters; or name networks and, with mask_path, their parts'
        yield shown.problem(what, place, place + 3, fix=fix)
    if parts < regions:
        what = f"{regions} networks act in parts of the picture, and the prompt has {parts} for them"
        fix = 'part the prompt by " AND ", one for each network, or remove mask_path'
        yield shown.problem(what, 0, max(1, len(request.prompt)), fix=fix)
    if request.negative_scale is not None and request.scale <= 1:
        place = re.search(r"(?:^| )--nl\b", text, re.IGNORECASE)
        if place:
            what = f"--nl cannot act: there is no guidance at scale {request.scale:g}"
            yield shown.problem(what, place.end() - 4, place.end(), fix="remove it, or set a scale above 1 with --l")
    for names, what, fix in effects_that_cannot_act(request):
        place = re.search(rf"(?:^| )(--(?:{names}))\b", text, re.IGNORECASE)
        if place:
            yield shown.problem(f"{place[1]} cannot act: {what}", place.start(1), place.end(1), fix=fix)


def warn_of_generator_syntax(prompt: str) -> None:
    """Say what the sample prompts of training do not have."""
    if re.search(r"\{[^{}]*\|[^{}]*\}", prompt):
        logger.warning("{a|b} choices are not supported in sample prompts; they are drawn as text: %s", prompt)
    if AND in prompt:
        logger.warning("AND between sub-prompts acts in the generator only; here it is drawn as text: %s", prompt)
