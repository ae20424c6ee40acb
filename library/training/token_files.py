"""Writes embedding files: one for each token, named after it where there are several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.io.atomic import atomic_folder, atomic_path
from library.io.read_back import check_archive
from library.io.safetensors_file import save
from library.log import get_logger
from library.models.embedding_files import read_embedding
from library.training import naming
from library.training.hooks import View
from library.training.new_tokens import NewTokens
from library.training.writing import modelspec

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.bundle import ModelBundle

log = get_logger(__name__)


class TokenWriter:
    """Called as `writer(path, view)`: writes a single token's file, or a folder with one file for each of several.

    Every file is opened again before it takes its place.
    """

    def __init__(self, tokens: NewTokens, *, dtype: torch.dtype | None, cfg: RunConfig, bundle: ModelBundle) -> None:
        self.tokens, self.dtype, self.cfg = tokens, dtype, cfg
        self.prediction_type = bundle.prediction_type
        self.suffix = ".pt" if cfg.save.save_model_as == "pt" else ".safetensors"
        self.extension = self.suffix if len(tokens.counts) == 1 else ""

    def __call__(self, path: Path, view: View) -> None:
        """Write one checkpoint to `path`."""
        states = self.tokens.state_of(self.dtype)
        if self.extension:
            ((token, tensors),) = states.items()
            self._write(path, token, tensors)
        else:
            self.folder(path)
        log.info(f"saved {path}")

    def folder(self, path: Path) -> None:
        """Write a folder with a file for each token, under the token's name; it appears whole."""
        with atomic_folder(path) as partial:
            for token, tensors in self.tokens.state_of(self.dtype).items():
                self._write(partial / f"{token}{self.suffix}", token, tensors)

    def _write(self, path: Path, token: str, tensors: Mapping[str, Tensor]) -> None:
        if self.suffix == ".pt":
            with atomic_path(path) as partial:
                torch.save(dict(tensors), partial)
                check_archive(partial)
            read_embedding(path)
            return
        header = modelspec(self.cfg, "textual-inversion", self.prediction_type)
        header.setdefault("modelspec.trigger_phrase", token)
        save(tensors, path, header, checked=True)
        read_embedding(path)


class WithTokens:
    """A network's writer, with a folder of embedding files beside every file that it writes."""

    def __init__(self, write: Callable[[Path, View], None], tokens: TokenWriter) -> None:
        self.write, self.tokens = write, tokens

    def __call__(self, path: Path, view: View) -> None:
        """Write the network to `path` and the tokens beside it."""
        self.write(path, view)
        self.tokens.folder(naming.tokens_beside(path))
