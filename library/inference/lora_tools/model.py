"""A checkpoint that is read tensor by tensor: its structure on the meta device, its weights when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from library.inference.adapters import adapter_roots
from library.io.keymap import KeyMap
from library.models.arch import PARTS, Part
from library.models.assemble import empty_module, part_keymap
from library.models.checkpoint import resolve_checkpoint
from library.models.identify import require_parts
from library.models.opened import OpenedModel, open_model
from networks._keys import AdapterRoot, Target, all_targets, default_targets

_LIBRARY_PARTS: dict[str, Part] = {"te1": "text_encoder_1", "te2": "text_encoder_2", "unet": "unet"}


@dataclass
class _Structure:
    """The modules that adapters sit on, as `adapter_roots` asks a bundle for them."""

    unet: nn.Module
    text_encoder_1: nn.Module
    text_encoder_2: nn.Module


class StreamedModel:
    """An open single file or diffusers folder; nothing but one tensor at a time is read.

    Raises UserError as loading a model does, from names and shapes alone.
    """

    def __init__(self, name: str, stack: ExitStack) -> None:
        path = resolve_checkpoint(name)
        self.where = name
        # Without mapping: pages of a mapped file count as memory of the process as long as it is open.
        self.opened: OpenedModel = open_model(path, half=False, mmap=False, stack=stack, where=name)
        self.arch = self.opened.arch
        require_parts(self.arch, PARTS, where=name)
        self.modules: dict[Part, nn.Module] = {part: empty_module(self.arch, part) for part in PARTS}
        self.tensors: dict[Part, Mapping[str, Tensor]] = {
            part: self.opened.tensors(part, module) for part, module in self.modules.items()
        }
        structure: Any = _Structure(*(self.modules[part] for part in ("unet", "text_encoder_1", "text_encoder_2")))
        self.roots: list[AdapterRoot] = adapter_roots(structure)
        self._paths = {id(module): path for root in self.roots for path, module in root.module.named_modules() if path}

    def keymap(self, part: Part) -> KeyMap:
        """Names of the part in the single file and in its library."""
        return part_keymap(self.arch, part)

    def targets(self, *, default: bool = False, with_conv: bool = False) -> Iterator[Target]:
        """Modules that files can name or, with `default`, those that training adapts; on the meta device."""
        if default:
            return default_targets(self.roots, with_conv=with_conv)
        return all_targets(self.roots)

    def part_of(self, target: Target) -> Part:
        """The part that a target is in."""
        return _LIBRARY_PARTS[target.part]

    def root_of(self, target: Target) -> AdapterRoot:
        """The root that a target was found under."""
        return next(root for root in self.roots if root.part == target.part)

    def path_of(self, target: Target) -> str:
        """The target's module path below its root, with dots."""
        return self._paths[id(target.module)]

    def weight(self, target: Target) -> Tensor:
        """The target's weight as it is stored."""
        return self.tensors[self.part_of(target)][self.path_of(target) + ".weight"]
