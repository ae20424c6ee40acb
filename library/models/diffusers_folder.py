"""Read and write SDXL as a diffusers folder: one sub-folder per part, model_index.json beside them."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.io.atomic import atomic_folder
from library.io.checkpoint_file import read_checkpoint
from library.io.safetensors_file import TensorSource, read_header, save
from library.models.arch import PART_NAMES, Part
from library.models.assemble import position_id_keys
from library.models.bundle import ModelBundle
from library.models.keymaps.text import TEXT_MODEL, with_text_model
from library.models.keymaps.vae import modern_key
from library.models.prediction import Stated, of_scheduler, scheduler_of
from library.models.tensors import RenamedTensors
from library.models.tokenizers import write_tokenizer_folder

FOLDERS: dict[Part, str] = {
    "unet": "unet",
    "text_encoder_1": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "vae": "vae",
}
_CLASSES: dict[Part, tuple[str, str]] = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder_1": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "vae": ("diffusers", "AutoencoderKL"),
}
LOGIT_SCALE = "logit_scale"  # header metadata of text encoder 2: transformers has no place for this tensor


def weight_names(names: Iterable[str], part: Part, *, half: bool) -> list[str]:
    """Which of a sub-folder's files hold the part's weights; empty when none does.

    Safetensors before PyTorch files; with `half` the fp16 variant first, without it last. Shards come in order.
    """
    present = set(names)
    stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
    old_stem = stem if part in ("unet", "vae") else "pytorch_model"
    variants = (".fp16", "") if half else ("", ".fp16")
    for base, ending in ((stem, "safetensors"), (old_stem, "bin")):
        for variant in variants:
            whole = f"{base}{variant}.{ending}"
            if whole in present:
                return [whole]
            shard = re.compile(
                rf"{base}(-\d{{5}}-of-\d{{5}}{re.escape(variant)}|{re.escape(variant)}-\d{{5}}-of-\d{{5}})\.{ending}"
            )
            shards = sorted(name for name in present if shard.fullmatch(name))
            if shards:
                return shards
    return []


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a part's folder; UserError when it is missing or not JSON."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the configuration cannot be read ({type(error).__name__})",
            where=str(path),
            fix="give a whole diffusers folder, with model_index.json in it",
        ) from None


def open_part(folder: Path, part: Part, *, half: bool, mmap: bool, stack: ExitStack) -> RenamedTensors:
    """The part's tensors under the names of today's library classes; files are closed with `stack`.

    Accepts the names of older library versions: attention of the VAE, `text_model.` of text encoder 1, position
    numbers. Raises UserError when the folder has no weights.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = weight_names(names, part, half=half)
    if not found:
        raise UserError(
            f"no weights of the {PART_NAMES[part]} in the diffusers folder",
            where=str(folder),
            fix="download the folder again, with its .safetensors files",
        )
    sources: list[TensorSource] = [stack.enter_context(read_checkpoint(folder / name, mmap=mmap)) for name in found]
    places: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for source in sources:
        ignored = position_id_keys(list(source))
        places.update({_today(key, part): (source, key) for key in source if key not in ignored})
    return RenamedTensors(places)


def read_logit_scale(folder: Path) -> Tensor | None:
    """The logit scale that `write_folder` kept beside text encoder 2, None in other programs' folders."""
    path = folder / FOLDERS["text_encoder_2"] / "model.safetensors"
    if not path.is_file():
        return None
    with read_checkpoint(path) as source:
        text = source.metadata.get(LOGIT_SCALE)
        if text is None:
            return None
        value, _, dtype = text.partition(" ")
        return torch.tensor(float(value), dtype=getattr(torch, dtype))


def read_metadata(folder: Path) -> dict[str, str]:
    """The header texts that `write_folder` kept in the U-Net's file; empty for other programs' folders."""
    path = folder / FOLDERS["unet"] / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        return {}
    metadata, _ = read_header(path)
    return {key: value for key, value in metadata.items() if key != "format"}


def read_stated(folder: Path) -> Stated:
    """What the scheduler's configuration says about prediction type and schedule; nothing when there is none."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return Stated()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no table")
    except (OSError, ValueError) as error:
        raise UserError(f"the scheduler's configuration cannot be read ({error})", where=str(path)) from None
    return of_scheduler(config, where=str(path))


def write_folder(
    bundle: ModelBundle,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    states: Mapping[Part, Mapping[str, Tensor]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the bundle as a folder that StableDiffusionXLPipeline loads; it appears whole or not at all.

    Weights are cast one tensor at a time. Text encoder 1 gets the `text_model.` names that every version reads.
    `states` are the parts' tensors where the bundle's modules are empty; `metadata` goes to the U-Net's header.
    """
    with atomic_folder(folder) as temporary:
        for part, name in FOLDERS.items():
            module = getattr(bundle, part)
            state = states[part] if states else module.state_dict()
            header = {"format": "pt"} | (dict(metadata or {}) if part == "unet" else {})
            if part == "text_encoder_2" and bundle.logit_scale is not None:
                value = bundle.logit_scale if dtype is None else bundle.logit_scale.to(dtype)
                header[LOGIT_SCALE] = f"{value.item()!r} {str(value.dtype).removeprefix('torch.')}"
            _write_part(module, part, temporary / name, state=state, dtype=dtype, metadata=header)
        write_tokenizer_folder(temporary / "tokenizer", bundle.tokenizer, pad_token="<|endoftext|>")
        write_tokenizer_folder(temporary / "tokenizer_2", bundle.tokenizer, pad_token="!")
        (temporary / "scheduler").mkdir()
        scheduler = scheduler_of(bundle.prediction_type, bundle.schedule)
        _write_json(temporary / "scheduler" / "scheduler_config.json", _with_version(scheduler))
        _write_json(temporary / "model_index.json", _model_index(scheduler["_class_name"]))


def _write_part(
    module: nn.Module,
    part: Part,
    folder: Path,
    *,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> None:
    folder.mkdir()
    library, class_name = _CLASSES[part]
    if library == "diffusers":
        module.save_config(str(folder))
        stem = "diffusion_pytorch_model"
    else:
        config = json.loads(module.config.to_json_string(use_diff=False))
        stored = state[next(iter(state))].dtype if dtype is None else dtype
        config |= {"architectures": [class_name], "dtype": str(stored).removeprefix("torch.")}
        _write_json(folder / "config.json", config)
        state = RenamedTensors({with_text_model(key): (state, key) for key in state})
        stem = "model"
    save(state, folder / f"{stem}.safetensors", metadata, dtype=dtype, checked=True)


def _today(key: str, part: Part) -> str:
    if part == "vae":
        return modern_key(key)
    if part == "text_encoder_1":
        return key.removeprefix(TEXT_MODEL)
    return key


def _with_version(config: dict[str, Any]) -> dict[str, Any]:
    import diffusers

    return {"_class_name": config["_class_name"], "_diffusers_version": diffusers.__version__} | config


def _model_index(scheduler_class: str) -> dict[str, Any]:
    import diffusers

    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        "force_zeros_for_empty_prompt": True,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    return index | {FOLDERS[part]: list(names) for part, names in _CLASSES.items()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
