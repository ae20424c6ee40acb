"""Models and VAEs from the Hugging Face hub: only the files that are needed, or the cached ones when offline."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from library.errors import UserError
from library.models.arch import Part
from library.models.diffusers_folder import FOLDERS, weight_names

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INDEX_FILES = ("model_index.json", "scheduler/scheduler_config.json")
_OFFLINE_FIX = "check the connection, or give the path of a model on this computer"


def looks_like_id(name: str) -> bool:
    """Whether `name` could be a hub id such as owner/model (and is no file name)."""
    return _ID.fullmatch(name) is not None and not name.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin"))


def download_model(repo: str, *, parts: Iterable[Part], half: bool) -> Path:
    """Local folder of a hub model with the files of `parts`; fp16 files are taken when `half` or when alone there.

    Raises UserError when the id does not exist, is not a diffusers SDXL, or cannot be reached and is not cached.
    """
    chosen = tuple(parts)
    return _snapshot(repo, lambda files: model_files(files, chosen, half=half, repo=repo))


def download_vae(repo: str, *, half: bool) -> Path:
    """Local folder of a hub VAE, which lies at the root of its repository or in `vae`. Raises as `download_model`."""
    return _snapshot(repo, lambda files: vae_files(files, half=half, repo=repo))


def download_files(repo: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """Local folder of a hub repository with the files that `choose` picks. Raises as `download_model`."""
    return _snapshot(repo, choose)


def model_files(files: Iterable[str], parts: Iterable[Part], *, half: bool, repo: str) -> list[str]:
    """Paths inside a repository that `parts` need; UserError when a part has no weights there."""
    files = list(files)
    wanted: list[str] = [name for name in _INDEX_FILES if name in files]
    if "model_index.json" not in files:
        raise UserError(
            "this hub repository is not a diffusers model", where=repo, fix="download the single file and give its path"
        )
    wanted += [f"{folder}/config.json" for folder in FOLDERS.values() if f"{folder}/config.json" in files]
    for part in parts:
        wanted += _weights(files, f"{FOLDERS[part]}/", part, half=half, repo=repo)
    return wanted


def vae_files(files: Iterable[str], *, half: bool, repo: str) -> list[str]:
    """Paths inside a repository that its VAE needs; UserError when there is none."""
    files = list(files)
    prefix = "" if "config.json" in files else "vae/"
    if f"{prefix}config.json" not in files:
        raise UserError("this hub repository holds no diffusers VAE", where=repo, fix="give the path of a VAE file")
    return [f"{prefix}config.json", *_weights(files, prefix, "vae", half=half, repo=repo)]


def _weights(files: list[str], prefix: str, part: Part, *, half: bool, repo: str) -> list[str]:
    inside = [name[len(prefix) :] for name in files if name.startswith(prefix)]
    found = weight_names([name for name in inside if "/" not in name], part, half=half)
    if not found:
        raise UserError(f"no weights in {prefix or 'the root'} of this hub repository", where=repo)
    return [prefix + name for name in found]


def _snapshot(repo: str, choose: Callable[[list[str]], list[str]]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        files = choose(huggingface_hub.HfApi().list_repo_files(repo))
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=files))
    except GatedRepoError:
        raise UserError("this hub model asks for an agreement first", where=repo, fix="accept it, log in") from None
    except RepositoryNotFoundError:
        raise UserError(
            "there is no such file, folder or hub model", where=repo, fix="check the name (private models need a login)"
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    try:
        return Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        raise UserError(
            f"no such file or folder, and the hub cannot be reached ({reason})", where=repo, fix=_OFFLINE_FIX
        ) from None
