"""Open models and VAEs wherever they lie; tensors come under the names of the library classes, checked, read lazily."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.io.checkpoint_file import read_checkpoint
from library.io.safetensors_file import TensorSource
from library.models import diffusers_folder, identify, prediction
from library.models.arch import (
    PREFIXES,
    Part,
    SdxlArch,
    arch_from_tensors,
    facts_from_metadata,
    vae_from_tensors,
)
from library.models.assemble import check_tensors, library_shapes, part_keymap, position_id_keys, stored_shapes
from library.models.configs import arch_from_configs
from library.models.keymaps.vae import modern_key, vae_keymap
from library.models.prediction import Stated
from library.models.tensors import RenamedTensors, shapes_of, without_prefix

LOGIT_SCALE = "logit_scale"
_LINEAR_PROJECTION = "text_projection.weight"
_VAE_HEADS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


class OpenedModel(Protocol):
    """What can be asked of an open model; valid until the stack it was opened with is closed."""

    arch: SdxlArch
    metadata: dict[str, str]
    stated: Stated

    def tensors(self, part: Part, module: nn.Module) -> Mapping[str, Tensor]:
        """The part's tensors for `module` (which may be on the meta device).

        Raises UserError when names or shapes differ from what the module needs.
        """

    def logit_scale(self) -> Tensor | None:
        """bigG's logit scale, which no module holds; None when the files do not have it."""


def open_model(path: Path, *, half: bool, mmap: bool, stack: ExitStack, where: str) -> OpenedModel:
    """Open a single file or a diffusers folder; `half` prefers a folder's fp16 files. Raises UserError."""
    if path.is_dir():
        return _Folder(path, half=half, mmap=mmap, stack=stack, where=where)
    return _SingleFile(stack.enter_context(read_checkpoint(path, mmap=mmap)), where=where)


@dataclass
class OpenedVae:
    """An open VAE: its architecture, and its tensors under diffusers names or, with `ldm`, under LDM names."""

    arch: SdxlArch
    source: RenamedTensors
    ldm: bool
    where: str

    def tensors(self, module: nn.Module) -> Mapping[str, Tensor]:
        """The tensors for `module`; UserError when names or shapes differ from what it needs."""
        if self.ldm:
            return _stored(self.arch, "vae", module, self.source, where=self.where)
        check_tensors(library_shapes(module), shapes_of(self.source), part="vae", where=self.where)
        return self.source


def open_vae(path: Path, *, base: SdxlArch, half: bool, mmap: bool, stack: ExitStack, where: str) -> OpenedVae:
    """Open a replacement VAE: a diffusers folder (itself or its sub-folder `vae`) or a file of any layout.

    The returned architecture is `base` with this VAE in it. Files do not say their number of normalisation groups;
    without header metadata they are taken to have those of the base model. Raises UserError.
    """
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "vae"
        found = arch_from_configs({"vae": diffusers_folder.read_config(folder)}, where=where)
        source = diffusers_folder.open_part(folder, "vae", half=half, mmap=mmap, stack=stack)
        facts = replace(base.facts, vae_norm_groups=found.facts.vae_norm_groups)
        return OpenedVae(replace(base, vae=found.vae, facts=facts), source, ldm=False, where=where)
    file = stack.enter_context(read_checkpoint(path, mmap=mmap))
    prefix = PREFIXES["vae"] if any(key.startswith(PREFIXES["vae"]) for key in file) else ""
    inner = without_prefix(file, prefix)
    # Training leftovers (loss, averages) and, in whole checkpoints, the other parts are left out.
    places: dict[str, tuple[Mapping[str, Tensor], str]] = {
        modern_key(key): (inner, key) for key in inner if key.startswith(_VAE_HEADS)
    }
    source = RenamedTensors(places)
    if not source:
        raise UserError("there is no VAE in this file", where=where, fix="give an SDXL VAE, or a checkpoint with one")
    ldm = not any(".up_blocks." in key for key in source)
    stated = facts_from_metadata(file.metadata, where=where)
    groups = stated.vae_norm_groups if "arch.vae_norm_groups" in file.metadata else base.facts.vae_norm_groups
    try:
        found_vae = vae_from_tensors(shapes_of(source) if ldm else _ldm_shapes(source))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"this VAE is not of SDXL's kind (looked for {error})", where=where) from None
    facts = replace(base.facts, vae_norm_groups=groups)
    return OpenedVae(replace(base, vae=found_vae, facts=facts), source, ldm=ldm, where=where)


class _SingleFile:
    """A checkpoint in sd-scripts' layout, safetensors or PyTorch."""

    def __init__(self, source: TensorSource, *, where: str) -> None:
        identify.refuse_other_models(source, where=where)
        self._source, self._where = source, where
        self.metadata = dict(source.metadata)
        self.arch = arch_from_tensors(shapes_of(source), source.metadata, where=where)
        self.stated = prediction.of_single_file(source, source.metadata, where=where)

    def tensors(self, part: Part, module: nn.Module) -> Mapping[str, Tensor]:
        inner = without_prefix(self._source, PREFIXES[part])
        return _stored(self.arch, part, module, inner, where=self._where)

    def logit_scale(self) -> Tensor | None:
        key = PREFIXES["text_encoder_2"] + LOGIT_SCALE
        # A clone, for the file's mapping must not be kept alive by four bytes.
        return self._source[key].clone() if key in self._source else None


class _Folder:
    """A diffusers folder."""

    def __init__(self, path: Path, *, half: bool, mmap: bool, stack: ExitStack, where: str) -> None:
        self._path, self._half, self._mmap, self._stack, self._where = path, half, mmap, stack, where
        folders = {part: path / name for part, name in diffusers_folder.FOLDERS.items() if (path / name).is_dir()}
        configs = {part: diffusers_folder.read_config(folder) for part, folder in folders.items()}
        self.arch = arch_from_configs(configs, where=where)
        self.metadata: dict[str, str] = {}
        self.stated = diffusers_folder.read_stated(path)

    def tensors(self, part: Part, module: nn.Module) -> Mapping[str, Tensor]:
        folder = self._path / diffusers_folder.FOLDERS[part]
        source = diffusers_folder.open_part(folder, part, half=self._half, mmap=self._mmap, stack=self._stack)
        check_tensors(library_shapes(module), shapes_of(source), part=part, where=str(folder))
        return source

    def logit_scale(self) -> Tensor | None:
        return diffusers_folder.read_logit_scale(self._path)


def _stored(
    arch: SdxlArch, part: Part, module: nn.Module, inner: RenamedTensors, *, where: str
) -> Mapping[str, Tensor]:
    """A part of a single file (keys without its prefix) under library names, after checking names and shapes."""
    found = shapes_of(inner)
    ignored = position_id_keys(list(found)) | {LOGIT_SCALE}
    linear = part == "text_encoder_2" and "text_projection" not in found
    if part == "text_encoder_2" and not linear:
        ignored.add(_LINEAR_PROJECTION)  # some files hold it both ways
    for key in ignored & found.keys():
        del found[key]
    keymap = part_keymap(arch, part, linear_projection=linear)
    expected = stored_shapes(module, keymap)
    loose = {key: (*shape, 1, 1) for key, shape in found.items() if len(shape) == 2 and len(expected.get(key, ())) == 4}
    check_tensors(expected, found | loose, part=part, where=where, prefix=PREFIXES[part])
    return keymap.view(RenamedTensors({key: (inner, key) for key in found}))


def _ldm_shapes(source: RenamedTensors) -> dict[str, tuple[int, ...]]:
    """Shapes under LDM names of a VAE file with diffusers names."""
    num_levels = 1 + max(int(found[1]) for key in source if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", key)))
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes_of(source).items()}
    return shapes_of(vae_keymap(num_levels).view(empty, reverse=True))
