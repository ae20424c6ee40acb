"""Hashes that tools use to recognise model files, and a cheap identity of loaded weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.io.safetensors_file import serialized

_WINDOW = range(0x100000, 0x110000)  # the 64 KiB at 1 MiB that the first web UI hashed

_SAMPLES_PER_TENSOR = 256


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hex ("NOFILE" or "IsADirectory" where there is none to hash)."""
    path = Path(path)
    if not path.is_file():
        return _no_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def legacy_hash(path: str | os.PathLike[str]) -> str:
    """Return the old short hash of a file: 8 hex digits of SHA-256 over 64 KiB at 1 MiB (markers as `sha256_file`)."""
    path = Path(path)
    if not path.is_file():
        return _no_file(path)
    with open(path, "rb") as file:
        file.seek(_WINDOW.start)
        return hashlib.sha256(file.read(len(_WINDOW))).hexdigest()[:8]


def network_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return (sshs_model_hash, sshs_legacy_hash) of a network as it is about to be saved, without writing it.

    Both are taken over the safetensors form with only the ss_* metadata: the first over the bytes after the header,
    the second over its 64 KiB at 1 MiB, 8 digits. Source: spec model_files.md §10.
    """
    pieces = serialized(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    header = next(pieces)
    whole, window = hashlib.sha256(), hashlib.sha256(header[_WINDOW.start : _WINDOW.stop])
    position = len(header)
    for piece in pieces:
        whole.update(piece)
        window.update(piece[max(0, _WINDOW.start - position) : max(0, _WINDOW.stop - position)])
        position += len(piece)
    return whole.hexdigest(), window.hexdigest()[:8]


def tensors_identity(named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Return 16 hex digits that identify weights by names, shapes and values, whatever their order and storage.

    Values are compared as float32 at up to 256 evenly spaced elements of each tensor, so gigabytes cost
    milliseconds, and half-precision weights have the identity they have after being widened to float32. Not a proof
    against tampering. Raises ValueError for weights on the meta device.
    """
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(pairs, key=lambda pair: pair[0]):
        if tensor.is_meta:
            raise ValueError(f"{name} has no values yet")
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(_samples(tensor).numpy().tobytes())
    return digest.hexdigest()


def _samples(tensor: Tensor) -> Tensor:
    """Pick evenly spaced elements in logical order, the last included; strides do not matter, nothing is copied."""
    tensor = tensor.detach()
    count = tensor.numel()
    if count <= _SAMPLES_PER_TENSOR:
        return tensor.reshape(-1).to("cpu", torch.float32)
    places = np.arange(_SAMPLES_PER_TENSOR) * (count - 1) // (_SAMPLES_PER_TENSOR - 1)
    index = np.unravel_index(places, tuple(tensor.shape))  # torch's own imports sympy, 0.4 s
    return tensor[tuple(torch.from_numpy(axis) for axis in index)].to("cpu", torch.float32)


def _no_file(path: Path) -> str:
    return "IsADirectory" if path.is_dir() else "NOFILE"
