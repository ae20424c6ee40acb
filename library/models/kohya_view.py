"""The model as sd-scripts' modules see it: its module paths and class names over the real layers.

Network modules written for sd-scripts choose what they adapt by class name (`ResnetBlock2D`, `CrossAttention`) and name
it by module path (`input_blocks.4.1...`). diffusers has other paths and some other classes, and the wrong ones collide:
the path list of LyCORIS' default preset finds diffusers' `time_embedding.linear_1` twice. A view is a tree of empty
nodes with the right names whose leaves are the model's own layers, so what is done to a leaf is done to the model.
Source: lora_format.md §1 and §5, model_files.md §4, the module structure of the two implementations.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from library.errors import UserError
from library.models.keymaps.unet import diffusers_to_sai

# diffusers' class -> sd-scripts' class, and how many steps of the SAI path of a layer lie below the module.
_RENAMED = {"Attention": "CrossAttention"}
_STEPS_BELOW = {"ResnetBlock2D": 2, "Downsample2D": 1, "Upsample2D": 1}
_TRANSFORMER = frozenset({"Transformer2DModel", "BasicTransformerBlock", "Attention", "FeedForward", "GEGLU"})
# The order in which sd-scripts declares its parts: initial weights are drawn in it.
_TOP = ("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out")


class Node(nn.Module):
    """A module that has a name, a class name and children, and is never called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            raise UserError(
                f"the network module replaces the forward pass of a whole {type(self).__name__}, and only layers "
                "(Linear, Conv2d, norms) have one here",
                where="--network_module",
                fix="use a module that adapts layers",
            )
        super().__setattr__(name, value)


class View(Node):
    """The root of a tree of nodes; what a node does not know (config, device, dtype, calls) the real model answers."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.__dict__["_real"] = (real,)  # in a tuple: a child would appear in the tree

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_real":  # not yet there, while a copy is made
                raise
            return getattr(self._real[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | Any:
        """What the real model returns."""
        return self._real[0](*args, **kwargs)


def unet_view(unet: nn.Module) -> View:
    """sd-scripts' `SdxlUNet2DConditionModel` over diffusers' U-Net; its leaves are the layers that hold weights.

    Activations and dropouts, which hold none, are left out.
    """
    view = _class("SdxlUNet2DConditionModel", View)(unet)
    leaves = [
        (path, diffusers_to_sai(path), module)
        for path, module in unet.named_modules()
        if path and not any(module.children()) and any(True for _ in module.parameters())
    ]
    classes = _classes(unet, {path: sai for path, sai, _ in leaves})
    for _, sai, module in sorted(leaves, key=lambda leaf: _rank(leaf[1])):
        _insert(view, sai, module, classes)
    return view


def text_encoder_view(encoder: nn.Module) -> nn.Module:
    """The text encoder with `text_model.` before its modules' paths: transformers has left it out of CLIPTextModel's.

    An encoder whose paths have it is returned as it is.
    """
    if "text_model" in encoder._modules:
        return encoder
    view = _class(type(encoder).__name__, View)(encoder)
    view.add_module("text_model", encoder)
    return view


def _classes(unet: nn.Module, sai_of: dict[str, str]) -> dict[str, str]:
    """Class names of the nodes by SAI path."""
    found = {}
    for path, module in unet.named_modules():
        name = type(module).__name__
        if name not in _TRANSFORMER and name not in _STEPS_BELOW:
            continue
        leaf = next(below for below in sai_of if below.startswith(path + "."))
        # Inside a transformer the two implementations have the same paths.
        steps = _STEPS_BELOW.get(name, leaf.count(".") - path.count("."))
        found[sai_of[leaf].rsplit(".", steps)[0]] = _RENAMED.get(name, name)
    return found


def _insert(view: View, path: str, module: nn.Module, classes: dict[str, str]) -> None:
    *parents, last = path.split(".")
    node: nn.Module = view
    for depth, name in enumerate(parents, start=1):
        if name not in node._modules:
            here = ".".join(parents[:depth])
            node.add_module(name, _class(classes.get(here, "ModuleList"), Node)())
        node = node._modules[name]  # type: ignore[assignment]
    node.add_module(last, module)


def _rank(path: str) -> tuple[int, tuple[int, ...]]:
    """Order of the parts and, inside them, of block and place; layers of one place keep diffusers' order."""
    top, *rest = path.split(".")
    return _TOP.index(top), tuple(int(piece) for piece in rest[:2] if piece.isdigit())


def _class(name: str, base: type) -> type:
    return type(name, (base,), {})
