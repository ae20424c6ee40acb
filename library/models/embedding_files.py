"""Embedding files: sd-scripts' and diffusers' safetensors, and the PyTorch files of A1111, read without running code.

An SDXL embedding holds the same number V of vectors for both text encoders: clip_l (V, 768) and clip_g (V, 1280), or
the widths of the model in question. Source: lora_format.md section 8.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.errors import UserError
from library.io.safetensors_file import TensorReader

NAMES = ("clip_l", "clip_g")
_OTHER_NAMES = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
_PARAM = "string_to_param"
_OTHER_MODELS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
_AGAIN = "choose an embedding made for SDXL, which holds clip_l and clip_g"


class Embedding(NamedTuple):
    """The vectors behind one token: float32 (V, width) for each text encoder."""

    clip_l: Tensor
    clip_g: Tensor

    @property
    def num_vectors(self) -> int:
        """V."""
        return len(self.clip_l)

    def check_widths(self, widths: tuple[int, int], *, where: str) -> None:
        """Raise UserError unless the vectors have the widths of a model's text encoders."""
        have = (self.clip_l.shape[1], self.clip_g.shape[1])
        if have != widths:
            raise UserError(
                f"the embedding has vectors of {have[0]} and {have[1]} numbers, this model's have {widths[0]} and "
                f"{widths[1]}: it was made for another model",
                where,
                "choose an embedding made for this model",
            )


def read_embedding(path: str | os.PathLike[str]) -> Embedding:
    """The embedding in a file; what the file is decides, not its ending.

    Raises UserError for files that are missing, broken, of other models, or that would need to run code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError("there is no such embedding file", str(path), "check the path")
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
        return embedding_of(_unpickled(path), where=str(path))
    with TensorReader(path) as reader:
        return embedding_of({name: reader[name] for name in reader}, where=str(path))


def embedding_of(content: Mapping[str, Any], *, where: str) -> Embedding:
    """The embedding among the entries of a file, in any of the layouts; UserError where there is none for SDXL."""
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    inner = content.get(_PARAM)
    tensors |= dict(inner) if isinstance(inner, Mapping) else {}
    tensors = {name.removeprefix(f"{_PARAM}."): value for name, value in tensors.items()}
    found = {_OTHER_NAMES.get(name, name): value for name, value in tensors.items()}
    if not set(NAMES) <= set(found):
        raise _not_for_sdxl(found, where)
    pair = Embedding(*(torch.atleast_2d(found[name].detach().float()) for name in NAMES))
    for name, value in zip(NAMES, pair, strict=True):
        if value.ndim != 2 or not value.numel():
            raise UserError(f"{name} has shape {tuple(value.shape)}, not vectors in rows", where, "get the file again")
        if not torch.isfinite(value).all():
            raise UserError(f"{name} holds values that are not finite (NaN or infinite)", where, "use an earlier save")
    if len(pair.clip_l) != len(pair.clip_g):
        raise UserError(
            f"clip_l has {len(pair.clip_l)} vectors and clip_g {len(pair.clip_g)}", where, "get the file again"
        )
    return pair


def _not_for_sdxl(found: Mapping[str, Any], where: str) -> UserError:
    """What to say about a file that has not both encoders' vectors."""
    shapes = {name: tuple(value.shape) for name, value in found.items() if isinstance(value, Tensor)}
    if len(shapes) == 1:
        ((name, shape),) = shapes.items()
        width = shape[-1] if shape else 0
        kind = f"as those of {_OTHER_MODELS[width]} are" if width in _OTHER_MODELS else f"{width} numbers wide"
        return UserError(f"it is an embedding of one text encoder ({name}), {kind}; SDXL has two", where, _AGAIN)
    return UserError("it holds no embedding for SDXL (clip_l and clip_g)", where, _AGAIN)


def _unpickled(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            "the embedding holds more than tensors; it is not opened because doing so could run code",
            where=str(path),
            fix="convert it to safetensors with the program it came from",
        ) from error
    except Exception as error:  # the unpickler answers damaged files with whatever it runs into
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"the embedding cannot be read ({reason})", str(path), "get the file again") from error
    return content if isinstance(content, dict) else {}
