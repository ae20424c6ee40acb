"""The metadata that saved models carry: `modelspec.*` for everyone, and how `ss_*` values are written.

Source: spec model_files.md §8 and §9; the field names are Stability AI's model metadata standard.
"""

from __future__ import annotations

import base64
import mimetypes
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal

from library.errors import UserError
from library.sizes import Size

Kind = Literal["checkpoint", "lora", "textual-inversion", "control-net-lllite", "controlnet"]

FREE_FIELDS = (
    "author",
    "description",
    "license",
    "tags",
    "merged_from",
    "usage_hint",
    "thumbnail",
    "trigger_phrase",
    "preprocessor",
    "is_negative_embedding",
)
"""Fields a user fills freely (`--metadata_<field>`); the title has a default and is an argument of its own."""

_PROGRAM = "sdxl-trainer-suite"
_TITLES = {
    "checkpoint": "Checkpoint",
    "lora": "LoRA",
    "textual-inversion": "TextualInversion",
    "control-net-lllite": "ControlNetLLLite",
    "controlnet": "ControlNet",
}
_BASE_RESOLUTION = Size(1024, 1024)
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "rectified_flow": "rectified_flow"}


def modelspec_metadata(
    kind: Kind,
    *,
    created: datetime,
    title: str | None = None,
    resolution: Size | None = None,
    prediction_type: Literal["epsilon", "v_prediction", "rectified_flow"] = "epsilon",
    timestep_range: tuple[int | None, int | None] = (None, None),
    clip_skip: int | None = None,
    fields: Mapping[str, str | None] | None = None,
) -> dict[str, str]:
    """Return the `modelspec.*` entries of an SDXL file.

    `created` is local time; without a title the kind and the time make one. `resolution` is SDXL's own unless given.
    The prediction type is written as "epsilon", "v" or, outside the standard, "rectified_flow".
    `timestep_range` is written when either end is given. `fields` are FREE_FIELDS; None and unset ones are left out.
    """
    low, high = timestep_range
    entries: dict[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base" + ("" if kind == "checkpoint" else f"/{kind}"),
        "implementation": "https://github.com/Stability-AI/generative-models",
        "implementation_version": _PROGRAM,
        "title": title or f"{_TITLES[kind]}@{created.timestamp()}",
        "resolution": str(resolution or _BASE_RESOLUTION),
        "date": created.replace(tzinfo=None, microsecond=0).isoformat(),
        "prediction_type": _PREDICTIONS[prediction_type],
        "timestep_range": None if low is None and high is None else f"{low or 0},{1000 if high is None else high}",
        "encoder_layer": None if clip_skip is None else str(clip_skip),
    }
    for name, value in (fields or {}).items():
        assert name in FREE_FIELDS, name
        entries[name] = value
    return {f"modelspec.{name}": value for name, value in entries.items() if value is not None}


def thumbnail_url(value: str | os.PathLike[str]) -> str:
    """Return `value` if it is a data: URL already, else the picture file it names as one; UserError if unreadable."""
    text = os.fspath(value)
    if text.startswith("data:"):
        return text
    try:
        content = Path(text).read_bytes()
    except OSError as error:
        raise UserError(
            f"the thumbnail cannot be read ({error.strerror})", text, "check --metadata_thumbnail"
        ) from error
    kind = mimetypes.guess_type(text)[0] or "image/webp"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def ss_value(value: object) -> str:
    """Write a value as the training metadata does: `None` becomes "None", True "True", 1e-4 "0.0001"."""
    return str(value)
