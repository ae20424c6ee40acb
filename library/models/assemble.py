"""Build a part's module and put tensors into it, without ever holding a second copy of the weights.

The module is built on the meta device (structure, no memory), the tensors are cast one at a time and become its
parameters. A tensor that needs no cast stays a private mapping of its file: it costs memory only where it is touched.
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.errors import UserError
from library.io.keymap import KeyMap
from library.models.arch import PART_NAMES, Part, SdxlArch, Shape
from library.models.configs import part_config
from library.models.keymaps.text import big_g_keymap, clip_l_keymap
from library.models.keymaps.unet import unet_keymap
from library.models.keymaps.vae import vae_keymap
from library.models.tensors import shapes_of

_SHOWN = 3  # keys named in an error


def build_module(arch: SdxlArch, part: Part) -> nn.Module:
    """The part's module with new weights in its library's own initialisation, on the default device."""
    config = part_config(arch, part)
    if part == "unet":
        return UNet2DConditionModel(**config)
    if part == "vae":
        return AutoencoderKL(**config)
    if part == "text_encoder_1":
        return CLIPTextModel(CLIPTextConfig(**config))
    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def empty_module(arch: SdxlArch, part: Part) -> nn.Module:
    """The part's module on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return build_module(arch, part).eval()


def part_keymap(arch: SdxlArch, part: Part, *, linear_projection: bool = False) -> KeyMap:
    """Names of the part in the single file (A, without the part's prefix) and in its library (B)."""
    if part == "unet":
        assert arch.unet is not None
        return unet_keymap(len(arch.unet.channels))
    if part == "vae":
        assert arch.vae is not None
        return vae_keymap(len(arch.vae.channels))
    if part == "text_encoder_1":
        return clip_l_keymap()
    assert arch.text_encoder_2 is not None
    return big_g_keymap(arch.text_encoder_2.num_layers, linear_projection=linear_projection)


def check_tensors(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], *, part: Part, where: str, prefix: str = ""
) -> None:
    """UserError that names what is missing, unexpected or of another shape; `prefix` completes the keys shown."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    wrong = [key for key in expected if key in found and expected[key] != tuple(found[key])]
    complaints = []
    for keys, kind in ((missing, "missing"), (unexpected, "unexpected"), (wrong, "of another shape")):
        if keys:
            shown = ", ".join(prefix + key for key in keys[:_SHOWN])
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            complaints.append(f"{len(keys)} {kind} ({shown}{more})")
    if complaints:
        raise UserError(
            f"the {PART_NAMES[part]} is not complete SDXL: of its {len(expected)} tensors, " + "; ".join(complaints),
            where=where,
            fix="download the file again, or use another copy of the model; pruned, merged or renamed variants "
            "cannot be loaded",
        )


def filled(
    module: nn.Module, tensors: Mapping[str, Tensor], *, device: torch.device | str, dtype: torch.dtype, where: str
) -> nn.Module:
    """Turn a meta module into a real one with these tensors (library names, checked before) as frozen parameters."""
    state = {}
    for key in module.state_dict():
        tensor = tensors[key]
        if not tensor.is_floating_point():
            raise UserError(
                f"{key} holds {tensor.dtype} numbers: the file is quantised",
                where=where,
                fix="use the float16, bfloat16 or float32 version of the model",
            )
        tensor = tensor.to(device=device, dtype=dtype)
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()  # a third of a joined tensor: parameters in one storage cannot be written again
        state[key] = tensor.contiguous()
    module.load_state_dict(state, assign=True)
    _make_position_ids(module, device)
    left = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    assert not left, f"not loaded: {left}"
    return module.requires_grad_(False)


def stored_shapes(module: nn.Module, keymap: KeyMap) -> dict[str, Shape]:
    """Names (without prefix) and shapes that the module's tensors have in a single file."""
    return shapes_of(keymap.view({key: tensor.to("meta") for key, tensor in module.state_dict().items()}, reverse=True))


def library_shapes(module: nn.Module) -> dict[str, Shape]:
    """Names and shapes of the module's own tensors."""
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def position_id_keys(keys: Sequence[str]) -> set[str]:
    """Keys of stored position numbers: older files have them, they hold nothing."""
    return {key for key in keys if key.rpartition(".")[2] == "position_ids"}


def _make_position_ids(module: nn.Module, device: torch.device | str) -> None:
    """The text encoders number their positions in a buffer that no file stores."""
    for child in module.modules():
        if isinstance(getattr(child, "position_ids", None), Tensor):
            count = child.position_ids.shape[-1]
            child.position_ids = torch.arange(count, device=device).expand((1, -1))
