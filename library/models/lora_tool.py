"""The work of tools/convert_lora.py: files and PEFT folders in, files and PEFT folders out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from library.errors import UserError
from library.io.atomic import atomic_folder, write_json
from library.io.checkpoint_file import read_checkpoint
from library.io.hashing import network_hashes
from library.io.safetensors_file import save
from library.models.keymaps.lora import DOTTED_PREFIXES, Naming
from library.models.keymaps.text import TEXT_MODEL
from library.models.lora_convert import MAGNITUDE, Converted, convert, peft_configs
from library.models.lora_files import PEFT_HEADER, LoraFile, read_lora
from library.models.tensors import Bars, RenamedTensors, Watched, no_bar

NAMINGS: dict[str, Naming] = {
    "sd-scripts": "sd-scripts",
    "comfyui": "sd-scripts",
    "a1111": "sd-scripts",
    "sd-scripts-diffusers": "sd-scripts-diffusers",
    "diffusers": "diffusers",
    "peft": "diffusers",
}
_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_START = "base_model.model."
_READS = 2  # a tensor is asked for its shape and for its bytes


def run(arguments: argparse.Namespace, *, bar: Bars = no_bar) -> int:
    """Convert `arguments.model` to `arguments.save_to`; prints what was done and what changed its place.

    bar: shows the progress over all reads of tensors.
    """
    source, target = Path(arguments.model), Path(arguments.save_to)
    naming = NAMINGS[arguments.to]
    if arguments.fold_alpha and naming != "diffusers":
        raise UserError("fold_alpha is for diffusers and peft", "--fold_alpha", "leave it out: the file keeps alpha")
    if target.exists() and source.resolve() == target.resolve():
        raise UserError("the result would take the place of its source", str(target), "choose another name")
    if arguments.to != "peft" and target.suffix != ".safetensors":
        raise UserError("only safetensors files are written", str(target), "let its name end in .safetensors")
    with ExitStack() as stack:
        lora = open_lora(source, stack)
        done = convert(lora, naming, fold_alpha=arguments.fold_alpha)
        if arguments.to == "peft":
            _write_peft(target, lora, done, folded=arguments.fold_alpha, bar=bar)
        else:
            metadata = dict(done.metadata)
            hashed = naming != "diffusers" and any(key.startswith("ss_") for key in metadata)
            reads = _READS * (1 + hashed)
            with bar(len(done.tensors) * reads) as shown:
                tensors = Watched(done.tensors, shown.update, reads=reads)
                if hashed:
                    names = ("sshs_model_hash", "sshs_legacy_hash")
                    metadata |= zip(names, network_hashes(tensors, metadata), strict=True)
                save(tensors, target, metadata, checked=True)
        print(f"{len(lora.modules)} modules, {len(done.tensors)} tensors: {source} -> {target} ({arguments.to})")
        for note in done.notes:
            print(f"note: {note}")
    return 0


def open_lora(path: Path, stack: ExitStack) -> LoraFile:
    """Open a LoRA file, or a PEFT folder with one sub-folder per part; valid until `stack` is closed."""
    if not path.is_dir():
        source = stack.enter_context(read_checkpoint(path))
        return read_lora(source, source.metadata, where=str(path))
    folders = {part: path / part for part in DOTTED_PREFIXES.values() if (path / part / _PEFT_CONFIG).is_file()}
    if not folders:
        raise UserError(
            "there is no PEFT adapter in this folder",
            str(path),
            f"give a LoRA file, or a folder with unet/{_PEFT_CONFIG} (or text_encoder, text_encoder_2)",
        )
    places: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    configs: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] = {}
    for part, folder in folders.items():
        configs[part] = json.loads((folder / _PEFT_CONFIG).read_text(encoding="utf-8"))
        weights = stack.enter_context(read_checkpoint(folder / _PEFT_WEIGHTS))
        metadata |= weights.metadata
        places |= {f"{part}.{key.removeprefix(_PEFT_START)}": (weights, key) for key in weights}
    return read_lora(RenamedTensors(places), metadata, where=str(path), configs=configs)


def _write_peft(target: Path, lora: LoraFile, done: Converted, *, folded: bool, bar: Bars) -> None:
    """One adapter folder per part, each for `PeftModel.from_pretrained(model, folder)` with today's classes."""
    metadata = {key: value for key, value in done.metadata.items() if key != PEFT_HEADER}
    with bar(len(done.tensors) * _READS) as shown, atomic_folder(target) as folder:
        tensors = Watched(done.tensors, shown.update, reads=_READS)
        for part, config in peft_configs(lora, folded=folded).items():
            head = DOTTED_PREFIXES[part] + "."
            places: dict[str, tuple[Mapping[str, Tensor], str]] = {}
            for key in tensors:
                if key.startswith(head):
                    path = key.removeprefix(head)
                    # transformers 5 leaves text_model. out of the first text encoder's modules.
                    path = path.removeprefix(TEXT_MODEL) if part == "te1" else path
                    path = path.replace(f".{MAGNITUDE}.weight", f".{MAGNITUDE}")
                    places[_PEFT_START + path] = (tensors, key)
            own = folder / DOTTED_PREFIXES[part]
            own.mkdir()
            save(RenamedTensors(places), own / _PEFT_WEIGHTS, metadata, checked=True)
            fixed = {"peft_type": "LORA", "task_type": None, "bias": "none", "inference_mode": True}
            write_json(own / _PEFT_CONFIG, fixed | {"base_model_name_or_path": None} | config)
