"""Embeddings inside a network's file: `bundle_emb.<token>.<name in the embedding's own file>`.

Source: the format that A1111 and OneTrainer share (AUTOMATIC1111/stable-diffusion-webui pull request 13568). A token's
name holds no dot. SDXL's embeddings have the names clip_l and clip_g; string_to_param.* is that of one text encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

PREFIX = "bundle_emb."


def bundled(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The embeddings of a network's file by token, each under the names of its own file."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in bundled_keys(tensors):
        token, _, name = key.removeprefix(PREFIX).partition(".")
        found.setdefault(token, {})[name] = tensors[key]
    return found


def bundled_keys(keys: Iterable[str]) -> list[str]:
    """The names that belong to embeddings."""
    return [key for key in keys if key.startswith(PREFIX)]


def bundle(embeddings: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of embeddings, by token, as they stand in a network's file."""
    return {f"{PREFIX}{token}.{name}": value for token, values in embeddings.items() for name, value in values.items()}
