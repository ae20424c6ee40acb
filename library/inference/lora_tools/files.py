"""Reading LoRA files module by module, of any model and in any of the three spellings of the two factors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.inference.lora_tools.names import part_of, sd_scripts_name
from library.io.bundled import bundled, bundled_keys
from library.io.checkpoint_file import read_checkpoint
from library.io.safetensors_file import TensorSource
from library.log import get_logger
from library.models.tensors import shape_of
from networks._algebra import Factors
from networks._files import FOREIGN_KINDS

log = get_logger(__name__)

# (down, up) as the ends of tensor names: sd-scripts', PEFT's, and those of older diffusers files.
SPELLINGS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".down.weight", ".up.weight"),
)
_PARTS = ("te1", "te2", "unet")
_AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class LowRank:
    """One module of a file: its tensors' names, shapes as stored, rank and alpha (the rank where none is stored)."""

    name: str
    down_key: str
    up_key: str
    alpha_key: str
    down_shape: tuple[int, ...]
    up_shape: tuple[int, ...]
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of down."""
        return self.down_shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def is_conv(self) -> bool:
        """Whether the tensors have four dimensions."""
        return len(self.down_shape) == 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that the module changes."""
        return (self.up_shape[0], *self.down_shape[1:])


class LoraFile:
    """An open file of low-rank modules; `modules` by name, in the file's order, their shapes checked.

    Raises UserError for what is no LoRA, and names the module where factors are missing, do not fit each other, or
    have rank 0.
    """

    def __init__(self, path: str, stack: ExitStack) -> None:
        self.where = path
        # Without mapping: pages of a mapped file count as memory of the process as long as it is open.
        self.source: TensorSource = stack.enter_context(read_checkpoint(os.path.expanduser(path), mmap=False))
        self.metadata = dict(self.source.metadata)
        self.modules: dict[str, LowRank] = {}
        for down_key, up_key, stem in self._pairs():
            module = self._module(stem, down_key, up_key)
            self.modules[module.name] = module
        if tokens := bundled(self.source):
            log.warning("%s: the embeddings in it are left out: %s", path, ", ".join(sorted(tokens)))
        missing = sum(module.alpha_key not in self.source for module in self.modules.values())
        if missing:
            log.warning("%s: %d of %d modules have no alpha: the rank is used", path, missing, len(self.modules))

    def factors(self, module: LowRank) -> Factors:
        """up_Or and down_rI in float32, a convolution's kernel flattened; UserError for NaN and infinity."""
        found = []
        for key in (module.up_key, module.down_key):
            tensor = self.source[key].float()
            if not torch.isfinite(tensor).all():
                raise UserError(f"{key} holds NaN or infinity", self.where, "the file is broken: use an earlier save")
            found.append(tensor.flatten(1))
        return Factors(*found)

    def check_values(self) -> None:
        """Read the whole file once; UserError for NaN and infinity, before any long work has begun."""
        for module in self.modules.values():
            self.factors(module)

    def renamed(self) -> dict[str, LowRank]:
        """The modules under sd-scripts' names for SDXL. UserError for other models and for modules named twice."""
        found: dict[str, LowRank] = {}
        for name, module in self.modules.items():
            refuse_foreign_part(name, self.where)
            ours = sd_scripts_name(name)
            if ours in found:
                raise named_twice(ours, found[ours].name, name, self.where)
            found[ours] = module
        return found

    def _pairs(self) -> Iterator[tuple[str, str, str]]:
        """(down key, up key, module name); every tensor must have a place."""
        seen: set[str] = set()
        tokens = frozenset(bundled_keys(self.source))
        for key in (key for key in self.source if key not in tokens):
            ends = next((pair for pair in SPELLINGS if key.endswith(pair)), None)
            if ends is None:
                if not key.endswith(".alpha"):
                    raise self._foreign(key)
                continue
            stem = key[: -len(ends[0])] if key.endswith(ends[0]) else key[: -len(ends[1])]
            down, up = stem + ends[0], stem + ends[1]
            for wanted in (down, up):
                if wanted not in self.source:
                    raise UserError(f'"{wanted}" is missing', self.where, "the file is incomplete: get it again")
            if key == down:
                if stem in seen:
                    raise UserError(f'"{stem}" is in the file in two spellings', self.where, "remove one of them")
                seen.add(stem)
                yield down, up, stem
        if not seen:
            raise UserError("the file holds no LoRA", self.where, "choose a LoRA file")

    def _module(self, name: str, down_key: str, up_key: str) -> LowRank:
        down, up = (shape_of(self.source, key) for key in (down_key, up_key))
        if 0 in (*down, *up):
            raise UserError(f"{name} has rank 0 (shapes {up} and {down})", self.where, _AGAIN)
        fits = len(down) == len(up) and len(down) in (2, 4) and up[1] == down[0] and set(up[2:]) <= {1}
        if not fits:
            raise UserError(
                f"{name}: up {up} and down {down} do not fit each other",
                self.where,
                "choose a LoRA or LoCon file; other kinds cannot be handled by this tool",
            )
        alpha_key = f"{name}.alpha"
        alpha = 0.0
        if alpha_key in self.source:
            shape = shape_of(self.source, alpha_key)
            if math.prod(shape) != 1:
                raise UserError(f"{alpha_key} has shape {shape}, and is one number", self.where, _AGAIN)
            alpha = float(self.source[alpha_key])
        if not torch.isfinite(torch.tensor(alpha)):
            raise UserError(f"{alpha_key} is {alpha}", self.where, "the file is broken: use an earlier save")
        return LowRank(name, down_key, up_key, alpha_key, down, up, alpha or float(down[0]))

    def _foreign(self, key: str) -> UserError:
        tail = key.partition(".")[2]
        kind = FOREIGN_KINDS | {"dora_scale": "a DoRA", "oft_blocks": "an OFT"}
        if tail in kind:
            what = f"it is {kind[tail]} file, whose change is no product of two factors"
            fix = "choose a LoRA or LoCon file"
            if tail in ("dora_scale", "oft_blocks"):
                fix = "merge it into its checkpoint (tools/merge_lora.py --sd_model), then extract a LoRA"
        elif key.startswith(("model.diffusion_model.", "conditioner.", "first_stage_model.")):
            what, fix = "it is a whole checkpoint, not a LoRA", "give the LoRA file"
        else:
            what, fix = f'"{key}" is not a tensor of a LoRA', "choose a LoRA file"
        return UserError(what, self.where, fix)


def refuse_foreign_part(name: str, where: str) -> None:
    """UserError unless a module's name is one that SDXL's LoRA files have."""
    part = part_of(name)
    if part in _PARTS and name.startswith(("lora_", "oft_")):
        return
    if part == "te":
        raise UserError(
            f"{name} is of a model with one text encoder: this LoRA is for Stable Diffusion 1.x or 2.x",
            where,
            "choose a LoRA made for SDXL (lora_unet_, lora_te1_, lora_te2_)",
        )
    raise UserError(
        f"{name} does not begin with lora_unet_, lora_te1_ or lora_te2_",
        where,
        "convert the file to sd-scripts' layout first",
    )


def named_twice(ours: str, first: str, second: str, where: str) -> UserError:
    """What to say about a module that a file holds under two names."""
    return UserError(f'"{ours}" is in the file twice, as {first} and as {second}', where, "remove one of them")


def rank_and_alpha(pairs: Iterable[tuple[int, float]]) -> tuple[str, str]:
    """ss_network_dim and ss_network_alpha of modules: the common value, or "Dynamic"."""
    pairs = list(pairs)
    ranks, alphas = {rank for rank, _ in pairs}, {alpha for _, alpha in pairs}
    return (
        str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    )


def stored(factor: Tensor, shape: tuple[int, ...], *, up: bool) -> Tensor:
    """A factor as files hold it for a weight of `shape`: (r, in, kh, kw) and (out, r, 1, 1) for convolutions."""
    if len(shape) == 2:
        return factor
    return factor[:, :, None, None] if up else factor.reshape(len(factor), *shape[1:])


def stem_of(path: str) -> str:
    """A file's name without folder and ending."""
    return Path(path).stem
