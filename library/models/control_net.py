"""ControlNets of SDXL: what a file or folder holds, whether it fits a model, and the network itself.

Read are diffusers folders and single safetensors files, with diffusers' names or with those of the original ControlNet
(`input_hint_block`, `zero_convs`, with or without `control_model.`). Only headers are read until a network is loaded.
Source of the names: the module structure of the two implementations (lllyasviel's cldm.py, diffusers' controlnet.py).
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from library.errors import UserError
from library.io.safetensors_file import TensorReader
from library.models.arch import SdxlArch, Shape
from library.models.assemble import filled
from library.models.configs import part_config
from library.models.diffusers_folder import read_config, weight_names
from library.models.keymaps.unet import unet_keymap
from library.models.tensors import RenamedTensors, shapes_of

_PREFIX = "control_model."
_FIX = "choose a ControlNet that was trained on SDXL"
_SHOWN = 3
_HINT = "controlnet_cond_embedding"
_ADDED = "add_embedding.linear_1.weight"  # SDXL's; earlier models have no such layer

# (pattern of a tensor's name, what the file is, what to do); the first that fits any tensor wins
_Kinds = tuple[tuple[str, str, str], ...]
_RELATIVES: _Kinds = (
    (r"lora_controlnet$|.*\.(down|up)$", "a Control-LoRA, which is not supported", "choose a whole ControlNet"),
    (r"control_add_embedding|task_embedding", "a ControlNet for several tasks (union), which is not supported", _FIX),
)
_OTHERS: _Kinds = (
    (r"lllite_", "a ControlNet-LLLite", "give it as control_net_lllite_models"),
    (r"lora_|oft_|.*\.lora_", "a LoRA or one of its relatives", "give it as network_weights"),
    (r"adapter\.|body\.", "a T2I-Adapter, which is not supported", "choose a ControlNet"),
    (r"conditioner\.|first_stage_model\.|model\.diffusion_model\.", "a whole checkpoint", "give it as the model"),
    (r"(double|joint|transformer)_blocks\.", "a network of another family of models", _FIX),
)


@dataclass
class OpenedControlNet:
    """An open ControlNet: its tensors under diffusers' names, and a folder's configuration (None: of a single file)."""

    tensors: RenamedTensors
    config: Mapping[str, Any] | None
    where: str

    def empty(self, arch: SdxlArch) -> ControlNetModel:
        """The network for models of this architecture, on the meta device.

        Raises UserError where the tensors are not those of a ControlNet for such models.
        """
        found = shapes_of(self.tensors)
        config = _config(found, arch) if self.config is None else _of_folder(self.config, where=self.where)
        try:
            with torch.device("meta"):
                network = ControlNetModel(**config).eval()
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"the ControlNet's configuration cannot be used ({error})", self.where, _FIX) from None
        _check(network, found, arch, where=self.where)
        return network


def open_control_net(name: str, *, half: bool = False, stack: ExitStack) -> OpenedControlNet:
    """Open a ControlNet's headers, until `stack` is closed; `half` prefers a folder's fp16 file.

    Raises UserError for what is no ControlNet of SDXL's kind.
    """
    path = Path(name).expanduser()
    files, config = [path], None
    if not path.exists():
        raise UserError("there is no such ControlNet", name, "name a safetensors file or a diffusers folder")
    if path.is_dir():
        config = read_config(path)
        if config.get("_class_name") != "ControlNetModel":
            what = f"the folder holds a {config.get('_class_name', 'model without a name')}, not a ControlNet"
            raise UserError(what, name, _FIX)
        found = weight_names((entry.name for entry in path.iterdir()), "unet", half=half)
        files = [path / entry for entry in found]
    if not files or any(file.suffix != ".safetensors" for file in files):
        what = "ControlNets are read from safetensors files only" + (", and the folder has none" if config else "")
        raise UserError(what, name, "convert it to safetensors, or get it in that form")
    places: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for file in files:
        source = stack.enter_context(TensorReader(file))
        _refuse_others(source, where=name)
        places |= {new: (source, old) for new, old in _todays(source, where=name)}
    if _ADDED not in places:
        raise UserError("this ControlNet is for an earlier model: it takes no size ids", name, _FIX)
    return OpenedControlNet(RenamedTensors(places), config, name)


def load_control_net(
    name: str, arch: SdxlArch, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ControlNetModel:
    """The ControlNet for a model of this architecture, frozen, in eval mode. Raises UserError where it does not fit."""
    with ExitStack() as stack:
        opened = open_control_net(name, half=dtype != torch.float32, stack=stack)
        network = opened.empty(arch)
        filled(network, opened.tensors, device=device, dtype=dtype, where=name)
    for key, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            what = f'"{key}" holds values that are not finite (NaN or infinite)'
            raise UserError(what, name, "the network broke while it was trained: use another save of it")
    return network


def _refuse_others(names: Mapping[str, Tensor], *, where: str) -> None:
    takes_images = any(_HINT in name or "input_hint_block" in name for name in names)
    for pattern, kind, fix in _RELATIVES if takes_images else (*_RELATIVES, *_OTHERS):
        first = next((name for name in names if re.match(pattern, name)), None)
        if first is not None:
            raise UserError(f"this is {kind} (it has the tensor {first})", where, fix)
    if not takes_images:
        raise UserError("this is no ControlNet: nothing in it takes a control image", where, _FIX)


def _todays(names: Mapping[str, Tensor], *, where: str) -> Iterator[tuple[str, str]]:
    """(diffusers' name, name in the file) of every tensor."""
    if any(name.startswith(_HINT) for name in names):
        yield from ((name, name) for name in names)
        return
    table = unet_keymap()
    for name in names:
        inner = name.removeprefix(_PREFIX)
        found = _own_name(inner) or table.name(inner)
        if found is None:
            raise UserError(f"{name} is not a tensor of a ControlNet", where, _FIX)
        yield found, name


def _own_name(name: str) -> str | None:
    """diffusers' name of a tensor that the original ControlNet has beside a U-Net's."""
    if match := re.fullmatch(r"input_hint_block\.(\d+)\.(weight|bias)", name):
        place = int(match[1])  # convolutions at even places, activations between them
        layer = "conv_in" if place == 0 else "conv_out" if place == 14 else f"blocks.{place // 2 - 1}"
        return f"{_HINT}.{layer}.{match[2]}"
    if match := re.fullmatch(r"zero_convs\.(\d+)\.0\.(weight|bias)", name):
        return f"controlnet_down_blocks.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"middle_block_out\.0\.(weight|bias)", name):
        return f"controlnet_mid_block.{match[1]}"
    return None


def _config(found: Mapping[str, Shape], arch: SdxlArch) -> dict[str, Any]:
    """The configuration of a single file: that of the model, with what the tensors say of transformers and hint."""
    known = inspect.signature(ControlNetModel.__init__).parameters
    config = {name: value for name, value in part_config(arch, "unet").items() if name in known}
    levels = range(len(config["block_out_channels"]))
    depths = [_depth(found, rf"down_blocks\.{level}\.attentions\.0\.") for level in levels]
    middle = _depth(found, r"mid_block\.attentions\.0\.")
    config["down_block_types"] = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    config["mid_block_type"] = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"
    depths[-1] = depths[-1] or middle  # the middle has those of the last level
    config["transformer_layers_per_block"] = [max(depth, 1) for depth in depths]
    hints = [found[f"{_HINT}.conv_in.weight"][0]] if f"{_HINT}.conv_in.weight" in found else [16]
    while (key := f"{_HINT}.blocks.{2 * len(hints) - 1}.weight") in found:
        hints.append(found[key][0])
    return config | {"conditioning_embedding_out_channels": tuple(hints)}


def _depth(found: Mapping[str, Shape], place: str) -> int:
    numbers = [int(match[1]) for key in found if (match := re.match(rf"{place}transformer_blocks\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _of_folder(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    known = inspect.signature(ControlNetModel.__init__).parameters
    unknown = [name for name in config if not name.startswith("_") and name not in known and config[name] is not None]
    if unknown:
        raise UserError(f"config.json sets what ControlNets do not have: {', '.join(sorted(unknown))}", where, _FIX)
    return {name: value for name, value in config.items() if name in known}


def _check(network: ControlNetModel, found: Mapping[str, Shape], arch: SdxlArch, *, where: str) -> None:
    """UserError unless the tensors are those of the network, and the network fits models of this architecture."""
    unet, settings = part_config(arch, "unet"), network.config
    for name, what in (
        ("in_channels", "latent channels"),
        ("block_out_channels", "channels of its levels"),
        ("cross_attention_dim", "width of the text"),
        ("projection_class_embeddings_input_dim", "width of the size ids and the pooled text"),
    ):
        wanted = unet[name]
        have = settings[name]
        if (list(have) if isinstance(wanted, list) else have) != wanted:
            raise UserError(f"the {what} of this ControlNet are {have}, the model's {wanted}", where, _FIX)
    if settings.get("addition_embed_type") != "text_time" or settings["layers_per_block"] != 2:
        raise UserError("this ControlNet is not built like SDXL's U-Net", where, _FIX)
    if settings.get("global_pool_conditions"):
        raise UserError("this ControlNet pools its residuals (a shuffle model), which is not supported", where, _FIX)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    wrong = [name for name in expected if name in found and tuple(found[name]) != expected[name]]
    for names, kind in ((missing, "missing"), (unexpected, "not its own"), (wrong, "of another shape")):
        if names:
            shown = ", ".join(sorted(names)[:_SHOWN])
            fix = "the file is incomplete, or for another model: get it again, or choose one that was trained on SDXL"
            what = f"of the {len(expected)} tensors of this ControlNet {len(names)} are {kind} ({shown})"
            raise UserError(what, where, fix)
