"""ControlNet-LLLite: small networks that change what attention layers of the U-Net are given, by a control image.

y = base(x + multiplier * up(mid([cond, down(x)]))), cond = conditioning1(control image): one vector for each token.
Source: lora_format.md §6. This is no addition to a weight, so it is not of the adapters' family (`_adapter.py`): it
cannot be merged, and it acts on the input of a layer, before whatever adapters sit on that layer.

Shape letters: B batch, H W pixels, N tokens, D the layer's input width, E `cond_emb_dim`, M `mlp_dim`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.log import get_logger
from networks._keys import AdapterRoot
from networks._lllite_files import PREFIX, check_fit, group_tensors, sizes_of

logger = get_logger(__name__)

COND_EMB_DIM, MLP_DIM = 32, 64

# Kernels (and strides) of the convolutions that follow the first one, whose kernel is 4: together they make one cell
# out of the pixels of one token.
_FIRST_KERNEL = 4
_KERNELS = {1: (2,), 2: (4,), 3: (4, 2)}
_TARGET = re.compile(
    r"(?:input_blocks\.(\d+)|middle_block)\.1\.transformer_blocks\.\d+\.(?:attn1\.to_[qkv]|attn2\.to_q)"
)


class LLLiteTarget(NamedTuple):
    """A layer that gets a module: its name in files, and the depth, which tells the size of its tokens' cells."""

    name: str
    base: nn.Linear
    depth: int


class LLLiteModule(nn.Module):
    """The change of one layer's input. `up` starts at zero, bias included, so that the start is the base model.

    `state_dict()` has sd-scripts' names (conditioning1.0.weight ... up.0.bias). The layer is held without being
    registered, so that an optimizer, DDP or a state dict sees the module's own parameters only.
    """

    def __init__(
        self, base: nn.Linear, *, depth: int, cond_emb_dim: int, mlp_dim: int, dropout: float | None = None
    ) -> None:
        super().__init__()
        self._base = (base,)
        self.depth, self.dropout, self.multiplier = depth, dropout or 0.0, 1.0
        self.cell = _FIRST_KERNEL * math.prod(_KERNELS[depth])  # pixels of a token, each way
        self.condition_BNE: Tensor | None = None
        self.width = width = base.in_features
        # Made on the CPU, so that a seed gives the same start on every device; meta stays meta.
        with torch.device("meta" if base.weight.is_meta else "cpu"):
            self.conditioning1 = _convolutions(depth, cond_emb_dim)
            self.down = nn.Sequential(nn.Linear(width, mlp_dim), nn.ReLU())
            self.mid = nn.Sequential(nn.Linear(mlp_dim + cond_emb_dim, mlp_dim), nn.ReLU())
            self.up = nn.Sequential(nn.Linear(mlp_dim, width))
        nn.init.zeros_(self.up[0].weight)
        nn.init.zeros_(self.up[0].bias)
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def embed(self, control_B3HW: Tensor) -> Tensor:
        """The condition (B, N, E) of control images in [-1, 1].

        N counts the cells of the U-Net's grid, which rounds up: sides that are no multiple of a cell grow by their
        last row or column.
        """
        height, width = control_B3HW.shape[-2:]
        if height % self.cell or width % self.cell:
            margins = (0, -width % self.cell, 0, -height % self.cell)
            control_B3HW = F.pad(control_B3HW, margins, mode="replicate")
        return self.conditioning1(self._taken(control_B3HW)).flatten(2).transpose(1, 2)

    def change(self, x_BND: Tensor, condition_BNE: Tensor) -> Tensor:
        """What is added to the layer's input (B, N, D). Guidance asks for several branches of one picture at once:
        a batch that is a multiple of the condition's repeats it, branch after branch."""
        branches = len(x_BND) // len(condition_BNE)
        if branches > 1:
            condition_BNE = condition_BNE.repeat(branches, 1, 1)
        hidden = self.mid(torch.cat([condition_BNE, self.down(self._taken(x_BND))], dim=2))
        if self.training and self.dropout:
            hidden = F.dropout(hidden, p=self.dropout)
        return self.up(hidden) * self.multiplier

    def attach(self) -> None:
        """Act on the layer's input; a module that is attached later acts before this one, as in sd-scripts."""
        assert self._hook is None, "the module is attached already"
        self._hook = self._base[0].register_forward_pre_hook(self._before, prepend=True)

    def detach(self) -> None:
        """Leave the layer as it was."""
        assert self._hook is not None, "the module is not attached"
        self._hook.remove()
        self._hook = None

    def _before(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        # A multiplier of 0 leaves the base exactly as it is.
        if self.condition_BNE is None or self.multiplier == 0:
            return None
        (x_BND,) = arguments
        return (x_BND + self.change(x_BND, self.condition_BNE).to(x_BND.dtype),)

    def _taken(self, x: Tensor) -> Tensor:
        """x in the module's dtype, unless autocast will choose the dtype of its products."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.up[0].weight.dtype)


def _convolutions(depth: int, cond_emb_dim: int) -> nn.Sequential:
    kernels = _KERNELS[depth]
    half = cond_emb_dim // 2
    layers: list[nn.Module] = [nn.Conv2d(3, half, _FIRST_KERNEL, stride=_FIRST_KERNEL)]
    for index, kernel in enumerate(kernels):
        outputs = cond_emb_dim if index == len(kernels) - 1 else half
        layers += [nn.ReLU(), nn.Conv2d(half, outputs, kernel, stride=kernel)]
    return nn.Sequential(*layers)


class LLLiteNetwork(nn.Module):
    """The modules by sd-scripts' names, and the control images that they act by.

    Until `set_condition` is given images the network does nothing. facts: what the file's metadata tells of it.
    """

    def __init__(self, parts: Mapping[str, LLLiteModule], *, sizes: tuple[int, int], multiplier: float = 1.0) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))
        self.cond_emb_dim, self.mlp_dim = sizes
        self.facts = {
            "ss_network_module": "networks.control_net_lllite",
            "ss_network_dim": str(self.mlp_dim),
            "ss_network_args": json.dumps({"cond_emb_dim": self.cond_emb_dim}),
        }
        self.set_multiplier(multiplier)

    def attach(self) -> "LLLiteNetwork":
        """Act on the layers of the U-Net; returns itself."""
        for part in self.parts.values():
            part.attach()
        return self

    def detach(self) -> None:
        """Leave the U-Net as it was."""
        for part in self.parts.values():
            part.detach()

    def set_multiplier(self, multiplier: float) -> None:
        """Scale every change; 0 gives the base model exactly."""
        self.multiplier = multiplier
        for part in self.parts.values():
            part.multiplier = multiplier

    def set_condition(self, control_B3HW: Tensor | None) -> None:
        """Embed control images, (B, 3, H, W) in [-1, 1], for every call of the U-Net from now on; None: do nothing."""
        for part in self.parts.values():
            part.condition_BNE = None if control_B3HW is None else part.embed(control_B3HW)

    def export(self, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors of the network's file on the CPU, in `dtype` (None: as they are)."""
        return {
            f"{name}.{key}": value.detach().to("cpu", dtype or value.dtype).clone().contiguous()
            for name, part in self.parts.items()
            for key, value in part.state_dict().items()
        }

    def modules_in(self, tensors: Mapping[str, Tensor], *, where: str) -> dict[str, dict[str, Tensor]]:
        """A file's tensors by module; UserError where they do not fit. Both sides may be on the meta device."""
        widths = {name: part.width for name, part in self.parts.items()}
        modules = group_tensors(tensors, widths=widths, where=where)
        check_fit({name: self.parts[name].state_dict() for name in modules}, modules, where=where)
        return modules

    def load(self, tensors: Mapping[str, Tensor], *, where: str) -> None:
        """Take over a file's tensors. Modules that only one side has are told; UserError for files that do not fit."""
        modules = self.modules_in(tensors, where=where)
        for name, values in modules.items():
            self.parts[name].load_state_dict(values)
        missing = len(self.parts) - len(modules)
        told = f"{len(modules)} modules loaded" + (f", {missing} are not in the file" if missing else "")
        (logger.warning if missing else logger.info)("%s: %s", where, told)


def targets(root: AdapterRoot) -> Iterator[LLLiteTarget]:
    """The layers of a U-Net that get a module: q, k and v of self-attention and q of cross-attention, on the way down
    and in the middle; 136 in SDXL, 16 of depth 2 and 120 of depth 3."""
    for path, module in root.module.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        match = _TARGET.fullmatch(root.rename(path))
        if match is not None:
            block = int(match[1]) if match[1] else None
            depth = 3 if block is None or block > 5 else 2 if block > 2 else 1
            yield LLLiteTarget(PREFIX + match[0].replace(".", "_"), module, depth)


def create(
    root: AdapterRoot,
    *,
    cond_emb_dim: int = COND_EMB_DIM,
    mlp_dim: int = MLP_DIM,
    dropout: float | None = None,
) -> LLLiteNetwork:
    """A new network on a U-Net, not attached; it draws from torch's global generator. dropout: before `up`."""
    parts = {
        target.name: LLLiteModule(
            target.base, depth=target.depth, cond_emb_dim=cond_emb_dim, mlp_dim=mlp_dim, dropout=dropout
        )
        for target in targets(root)
    }
    return LLLiteNetwork(parts, sizes=(cond_emb_dim, mlp_dim))


def read(
    root: AdapterRoot, tensors: Mapping[str, Tensor], *, multiplier: float = 1.0, where: str = "the file"
) -> LLLiteNetwork:
    """The network that a file describes, not attached, with those modules only that the file has.

    E and M are read off the shapes. UserError for files of another kind or made for another model.
    """
    network = _described(root, tensors, where=where)
    network.set_multiplier(multiplier)
    network.load(tensors, where=where)
    return network


def check_base(root: AdapterRoot, tensors: Mapping[str, Tensor], *, where: str = "the file") -> None:
    """Raise UserError where `read` would, for a U-Net that may be on the meta device; so may the tensors."""
    _described(root, tensors, where=where).modules_in(tensors, where=where)


def _described(root: AdapterRoot, tensors: Mapping[str, Tensor], *, where: str) -> LLLiteNetwork:
    """A new network with the modules and sizes of a file."""
    cond_emb_dim, mlp_dim = sizes_of(tensors, where=where)
    known = {target.name: target for target in targets(root)}
    widths = {name: target.base.in_features for name, target in known.items()}
    modules = group_tensors(tensors, widths=widths, where=where)
    parts = {
        name: LLLiteModule(known[name].base, depth=known[name].depth, cond_emb_dim=cond_emb_dim, mlp_dim=mlp_dim)
        for name in modules
    }
    return LLLiteNetwork(parts, sizes=(cond_emb_dim, mlp_dim))
