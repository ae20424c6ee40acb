"""The embedded tiny SDXL, written out on first use as an ordinary single-file checkpoint."""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.io.safetensors_file import save
from library.models.arch import PREFIXES, Facts, Part, facts_metadata
from library.models.keymaps.text import big_g_keymap, clip_l_keymap
from library.models.keymaps.unet import unet_keymap
from library.models.keymaps.vae import vae_keymap
from library.models.tensors import joined
from library.models.tiny.unpack import WEIGHTS, unpack

NAME = "tiny"
CACHE_VARIABLE = "SDXL_SUITE_CACHE"
_PACKED_PREFIXES: dict[Part, str] = {"unet": "unet.", "text_encoder_1": "te1.", "text_encoder_2": "te2.", "vae": "vae."}
_WRITER_VERSION = "1"  # part of the cache file's name: raise it when the written file changes
_SAMPLE_SIZE = 16  # latent cells of the 128-pixel pictures that the model was trained on
_PACKING = ("tiny.configs", "tiny.token_tables", "tiny.format", "tiny.norm_groups", "tiny.head_dim")


def cache_folder() -> Path:
    """Where files that can be made again are kept: $SDXL_SUITE_CACHE, else the user's cache folder."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sdxl-trainer-suite"


def materialised_tiny() -> Path:
    """Path of the tiny SDXL as a single-file checkpoint in half precision, written when it is not there yet.

    The name holds a hash of the packed weights, so a new version of them makes a new file. Several processes may
    call this at once: each writes a temporary file and the renames are harmless.
    """
    if not WEIGHTS.is_file():
        raise UserError("the embedded tiny SDXL is missing", where=str(WEIGHTS), fix="reinstall, or clone again")
    content = hashlib.sha256(WEIGHTS.read_bytes() + _WRITER_VERSION.encode()).hexdigest()[:12]
    path = cache_folder() / f"{NAME}-{content}.safetensors"
    if not path.is_file():
        tensors, metadata = single_file_tensors()
        save(tensors, path, metadata, dtype=torch.float16)
    return path


def single_file_tensors(packed: Path = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The packed tiny model under single-file names, and the header metadata that goes with it."""
    state, packed_metadata = unpack(packed)

    def part(name: Part) -> dict[str, Tensor]:
        prefix = _PACKED_PREFIXES[name]
        return {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}

    num_layers = 1 + max(
        int(key.split(".")[3]) for key in part("text_encoder_2") if key.startswith("text_model.encoder.layers.")
    )
    keymaps = {
        "unet": unet_keymap(),
        "text_encoder_1": clip_l_keymap(),
        "text_encoder_2": big_g_keymap(num_layers),
        "vae": vae_keymap(),
    }
    views = joined([(prefix, keymaps[name].view(part(name), reverse=True)) for name, prefix in PREFIXES.items()])
    groups = int(packed_metadata["tiny.norm_groups"])
    facts = Facts(groups, groups, int(packed_metadata["tiny.head_dim"]), _SAMPLE_SIZE)
    about = {key: value for key, value in packed_metadata.items() if key not in _PACKING}
    title = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.title": "tiny SDXL",
        "modelspec.resolution": "128x128",
        "modelspec.prediction_type": "epsilon",
    }
    return dict(views), about | facts_metadata(facts) | title
