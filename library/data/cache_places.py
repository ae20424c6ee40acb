"""Where the caches of a run lie: beside the images, mirrored in a folder of the user's choice, or packed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.config.run_config import RunConfig
from library.errors import UserError

FOLDER_NAME = ".sdxl_cache"
"""The packed cache's own folder; hidden, so that no scan takes it for a folder of images."""

_FIX = "give --cache_dir a folder that can be written to"
_LISTED = 3


@dataclass(frozen=True)
class CachePlace:
    """What kind of cache a run has on disk: `store` as in --cache_store, and its folder.

    An npz cache without `folder` lies beside the images; a packed one always has a folder.
    """

    store: Literal["npz", "packed"] = "npz"
    folder: Path | None = None

    def npz_path(self, beside: Path) -> Path:
        """Where the entry is written that would stand at `beside`: there, or in the folder that mirrors its folder."""
        return beside if self.folder is None else mirrored(beside.parent, self.folder) / beside.name

    def npz_folders(self, folders: Sequence[str]) -> list[list[str]]:
        """For each folder of images where its npz files may lie; new ones go to the first."""
        if self.folder is None:
            return [[folder] for folder in folders]
        return [[str(mirrored(Path(folder), self.folder)), folder] for folder in folders]

    @property
    def latents(self) -> Path:
        """The packed store of latents."""
        return self._packed("latents")

    @property
    def text(self) -> Path:
        """The packed store of encoded captions."""
        return self._packed("text")

    def _packed(self, kind: str) -> Path:
        assert self.store == "packed" and self.folder is not None, "a packed cache has a folder"
        return self.folder / kind


BESIDE_THE_IMAGES = CachePlace()
"""npz files where sd-scripts has them."""


def cache_place(cfg: RunConfig) -> CachePlace:
    """The place that --cache_store and --cache_dir name.

    A packed cache without --cache_dir lies in `.sdxl_cache`: beside the dataset_config, else in train_data_dir, else
    beside the in_json file (of several the one that names the data).
    """
    if cfg.data.cache_store == "packed":
        return CachePlace("packed", packed_folder(cfg))
    return CachePlace("npz", index_folder(cfg))


def index_folder(cfg: RunConfig) -> Path | None:
    """Below which the indexes of the image folders lie; None when each lies in its folder."""
    return Path(os.path.abspath(cfg.data.cache_dir)) if cfg.data.cache_dir else None


def packed_folder(cfg: RunConfig) -> Path:
    """The folder of a packed cache: --cache_dir, or the one that goes with the data set."""
    data, chosen = cfg.data, index_folder(cfg)
    if chosen is not None:
        return chosen
    if data.train_data_dir and not data.dataset_config:
        return Path(os.path.abspath(data.train_data_dir)) / FOLDER_NAME
    named = data.dataset_config or data.in_json
    assert named, "a run names its data"
    return Path(os.path.abspath(named)).parent / FOLDER_NAME


def mirrored(folder: Path, cache_dir: Path) -> Path:
    """The folder in `cache_dir` for entries of the images in `folder`: its name, and 8 hex digits of its whole path."""
    whole = os.path.abspath(folder)
    digest = hashlib.blake2b(os.fsencode(whole), digest_size=4).hexdigest()
    return cache_dir / f"{os.path.basename(whole)}-{digest}"


def require_writable(folders: Iterable[Path]) -> None:
    """Raise UserError naming the folders in which no file can be made; missing folders are made.

    Permissions alone do not tell: the system's administrator passes them, and a whole file system may be read-only.
    """
    refused = [str(folder) for folder in sorted(set(folders)) if not _is_writable(folder)]
    if refused:
        more = f" and {len(refused) - _LISTED} more" if len(refused) > _LISTED else ""
        raise UserError("cache files cannot be written", ", ".join(refused[:_LISTED]) + more, _FIX)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return False
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
