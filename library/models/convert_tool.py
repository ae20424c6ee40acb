"""The work of tools/convert_checkpoint.py: a single file to a diffusers folder or back, tensor by tensor.

No module is filled: parts are checked against empty ones, and each tensor is read, renamed, cast and written by
itself. Files are read instead of mapped, so that the pages of a whole checkpoint never count as memory in use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from library.errors import UserError
from library.io.checkpoint_file import read_checkpoint
from library.models import checkpoint, diffusers_folder, identify
from library.models.arch import PARTS, PREFIXES
from library.models.assemble import empty_module, position_id_keys
from library.models.bundle import ModelBundle
from library.models.opened import LOGIT_SCALE, open_model
from library.models.prediction import MARKERS, ZERO_SNR_MARKER
from library.models.tensors import Bars, Watched, no_bar
from library.models.tokenizers import load_tokenizer

DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(arguments: argparse.Namespace, *, bar: Bars = no_bar) -> int:
    """Convert `arguments.model_to_load` to `arguments.model_to_save`; prints what was done and what was left out.

    bar: shows the progress over all reads of tensors.
    """
    asked = {name for name in DTYPES if getattr(arguments, name)} | {arguments.save_precision_as} - {None}
    if len(asked) > 1:
        raise UserError(f"several precisions are asked for: {', '.join(sorted(asked))}", "the flags", "choose one")
    dtype = DTYPES[asked.pop()] if asked else None
    source = checkpoint.resolve_checkpoint(arguments.model_to_load, half=arguments.variant == "fp16")
    target = Path(arguments.model_to_save)
    as_file = target.suffix == ".safetensors"
    if not as_file and target.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError("only safetensors and folders are written", str(target), "let the name end in .safetensors")
    if target.exists() and source == target.resolve():
        raise UserError("the result would take the place of its source", str(target), "choose another name")
    if not as_file and target.is_dir() and any(target.iterdir()) and not (target / "model_index.json").is_file():
        raise UserError("the folder holds other things than a model", str(target), "name a new folder")
    metadata = _metadata(arguments.metadata)
    notes = convert(source, target, dtype=dtype, half=arguments.variant == "fp16", metadata=metadata, bar=bar)
    print(f"{arguments.model_to_load} -> {target} ({'single file' if as_file else 'diffusers folder'})")
    for note in notes:
        print(f"note: {note}")
    return 0


def convert(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None,
    half: bool = False,
    metadata: Mapping[str, str],
    bar: Bars = no_bar,
) -> list[str]:
    """Write the model of `source` (file or folder) as a single file or, without `.safetensors`, as a folder.

    dtype None keeps what is stored, tensor by tensor. The header's texts, extended by `metadata`, and the prediction
    type go along. Returns sentences about what has no place in the target. Raises UserError as loading does.
    """
    with ExitStack() as stack:
        model = open_model(source, half=half, mmap=False, stack=stack, where=str(source))
        identify.require_parts(model.arch, PARTS, where=str(source))
        modules = {part: empty_module(model.arch, part) for part in PARTS}
        stored = {part: model.tensors(part, module) for part, module in modules.items()}
        # Twice: a writer asks for shapes, then for bytes.
        shown = stack.enter_context(bar(2 * sum(map(len, stored.values()))))
        states = {part: Watched(tensors, shown.update, reads=2) for part, tensors in stored.items()}
        kept = diffusers_folder.read_metadata(source) if source.is_dir() else model.metadata
        header = {key: value for key, value in kept.items() if key != "format"} | dict(metadata)
        bundle = ModelBundle(
            **modules,  # type: ignore[arg-type]  # by part, as in load_bundle
            tokenizer=load_tokenizer(),
            arch=model.arch,
            source=str(source),
            resolved_path=source,
            identify=lambda part: "",
            stated=model.stated,
            logit_scale=model.logit_scale(),
        )
        stated = model.stated
        bundle.set_prediction(
            stated.prediction_type or "epsilon",
            zero_terminal_snr=stated.zero_terminal_snr and stated.prediction_type != "rectified_flow",
            flow_shift=stated.flow_shift,
        )
        if target.suffix == ".safetensors":
            checkpoint.save_single_file(bundle, target, dtype=dtype, metadata=header, states=states)
        else:
            diffusers_folder.write_folder(bundle, target, dtype=dtype, states=states, metadata=header)
    return _left_out(source)


def _left_out(source: Path) -> list[str]:
    """What of a single file is no part of the model; folders hold nothing else."""
    if source.is_dir():
        return []
    with read_checkpoint(source) as tensors:
        keys = list(tensors)
    known = {*MARKERS, ZERO_SNR_MARKER}
    positions = position_id_keys(keys)
    others = [key for key in keys if not key.startswith(tuple(PREFIXES.values())) and key not in known]
    notes = [f"left out: {len(positions)} tensors of position numbers, which hold nothing"] if positions else []
    projection = PREFIXES["text_encoder_2"] + "text_projection.weight"
    if projection in keys:
        notes.append(f"{projection} is written as text_projection, the other way round, as SDXL's files have it")
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        notes.append(f"left out, for they are no part of SDXL: {shown}")
    if PREFIXES["text_encoder_2"] + LOGIT_SCALE not in keys:
        notes.append("the file has no logit_scale; so has the result")
    return notes


def _metadata(text: str | None) -> dict[str, str]:
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"this is not JSON: {error}", "--metadata", 'write {"key": "value"}') from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UserError("metadata must be texts by name", "--metadata", 'write {"key": "value"}')
    return found
