"""What made a picture, in the text form of A1111's web UI, which many programs read.

    prompt <lora:name:0.8>
    Negative prompt: words
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, Model: name

Source: stable-diffusion-webui, modules/processing.py `create_infotext` and modules/infotext_utils.py `quote` and
`parse_generation_parameters`. Sampler and schedule are written in one word ("DPM++ 2M Karras"), which all its versions
read. What it has no form for (size ids, negative_scale, guidance_rescale) is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.choices import default_eta, split_sampler
from library.inference.highres import first_stage
from library.inference.request import STRENGTH, GenRequest

if TYPE_CHECKING:
    from library.config.generate import GenerateOptions

# Those that A1111 does not have (dpmsolver, dpmsingle) keep their own names.
_SAMPLERS = {
    "ddim": "DDIM", "pndm": "PLMS", "lms": "LMS", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun",
    "dpm_2": "DPM2", "dpm_2_a": "DPM2 a", "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE", "unipc": "UniPC", "lcm": "LCM",
}  # fmt: skip
_NEGATIVE = "Negative prompt:"
_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST_SETTINGS = 3  # a last line with fewer belongs to the prompt


@dataclass(frozen=True)
class NetworkUse:
    """A network file and how strong it was in a picture."""

    file: str
    module: str
    strength: float


@dataclass(frozen=True)
class MadeBy:
    """The files that drew a picture, as they were named."""

    model: str = ""
    vae: str = ""
    networks: tuple[NetworkUse, ...] = ()


def made_by(options: GenerateOptions, request: GenRequest) -> MadeBy:
    """Which files draw a picture; networks that are not merged have the strengths of its prompt (`--am`)."""
    muls, num_merged = request.network_muls, len(options.network_weights) - num_live(options)
    uses = []
    for index, (file, module) in enumerate(zip(options.network_weights, options.network_module, strict=True)):
        strength = options.network_mul[index] if index < len(options.network_mul) else 1.0
        if muls and index >= num_merged:
            strength = muls[min(index - num_merged, len(muls) - 1)]
        uses.append(NetworkUse(file, module, strength))
    return MadeBy(options.ckpt or "", options.vae or "", tuple(uses))


def num_live(options: GenerateOptions) -> int:
    """How many networks are not merged, so that their strength can change."""
    return 0 if options.network_merge else len(options.network_weights) - (options.network_merge_n_models or 0)


def parameters_text(request: GenRequest, made: MadeBy | None = None) -> str:
    """The text of a picture: its prompt and networks, its negative prompt, its settings."""
    made = made or MadeBy()
    tags = "".join(f" <lora:{_stem(use.file)}:{_number(use.strength)}>" for use in made.networks)
    lines = [request.prompt + tags]
    if request.negative:
        lines.append(f"{_NEGATIVE} {request.negative}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in _settings(request, made)))
    return "\n".join(lines).strip()


def sampler_name(name: str) -> str:
    """A sampler in A1111's spelling: "DPM++ 2M Karras" for dpmpp_2m_karras."""
    basic, spread = split_sampler(name)
    if basic not in _SAMPLERS:
        return name
    return f"{_SAMPLERS[basic]} {spread.capitalize()}" if spread else _SAMPLERS[basic]


def read_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """The prompt, the negative prompt and the settings of such a text, as A1111 reads it; never fails.

    Lines are stripped and joined by line ends as they were; a text without settings is all prompt.
    """
    *lines, last = text.strip().split("\n")
    found = _SETTING.findall(last)
    if len(found) < _FEWEST_SETTINGS:
        lines, found = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    for line in (line.strip() for line in lines):
        if line.startswith(_NEGATIVE):
            negative.append(line.removeprefix(_NEGATIVE).strip())
        else:
            (negative or prompt).append(line)
    return "\n".join(prompt), "\n".join(negative), {name: _unquoted(value) for name, value in found}


def _settings(request: GenRequest, made: MadeBy) -> Iterator[tuple[str, str]]:
    first = first_stage(request) if request.highres is not None and request.stage != "0" else None
    begun = first or request  # of a picture in two sizes, A1111 names the smaller one's size and steps
    yield "Steps", str(begun.steps)
    yield "Sampler", sampler_name(request.sampler)
    yield "CFG scale", _number(request.scale)
    if request.seed is not None:
        yield "Seed", str(request.seed)
    yield "Size", f"{begun.size.w}x{begun.size.h}"
    if made.model:
        yield "Model", _stem(made.model)
    if made.vae:
        yield "VAE", Path(made.vae).name
    if first is not None or request.image is not None:
        yield "Denoising strength", _number(STRENGTH if request.strength is None else request.strength)
    if first is not None:
        yield "Hires resize", f"{request.size.w}x{request.size.h}"
        yield "Hires steps", str(request.steps)
    if request.eta is not None and request.eta != default_eta(request.sampler):
        yield "Eta DDIM" if split_sampler(request.sampler)[0] == "ddim" else "Eta", _number(request.eta)
    yield "RNG", "CPU"  # where the noise comes from; the same seed gives the same there with this setting


def _stem(path: str) -> str:
    name = Path(path).name
    return Path(name).stem if Path(name).suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") else name


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ",\n:") else text


def _unquoted(text: str) -> str:
    if len(text) < 2 or not (text.startswith('"') and text.endswith('"')):
        return text.strip()
    try:
        return str(json.loads(text))
    except json.JSONDecodeError:
        return text
