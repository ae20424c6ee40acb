"""Reading ControlNet-LLLite files: is it one, of which sizes, does it fit the model? Source: lora_format.md §6."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from library.errors import UserError

PREFIX = "lllite_unet_"
_FIRST, _DOWN = "conditioning1.0.weight", "down.0.weight"
_FIX = "choose a LLLite that was trained on this base model, which for most is SDXL"


def sizes_of(tensors: Mapping[str, Tensor], *, where: str) -> tuple[int, int]:
    """(cond_emb_dim, mlp_dim) of a file, from the shapes of its first module.

    Raises UserError for files of another kind.
    """
    refuse_other_kinds(tensors, where=where)
    name = next(key for key in tensors if key.startswith(PREFIX)).partition(".")[0]
    conditioning, down = tensors.get(f"{name}.{_FIRST}"), tensors.get(f"{name}.{_DOWN}")
    if conditioning is None or down is None or conditioning.ndim != 4 or down.ndim != 2:
        raise UserError(f"{name} has no {_FIRST} or no {_DOWN}", where, "the file is incomplete: get it again")
    return 2 * conditioning.shape[0], down.shape[0]


def refuse_other_kinds(names: Collection[str], *, where: str) -> None:
    """Raise UserError unless all tensors have names of a LLLite."""
    others = [name for name in names if not name.startswith(PREFIX)]
    if names and not others:
        return
    if not names:
        raise UserError("the file holds no tensors", where, _FIX)
    first, kind, fix = others[0], "", _FIX
    if first.startswith(("lora_", "oft_")):
        kind, fix = ": it is a LoRA or one of its relatives", "give it as network_weights"
    elif first.startswith(("model.", "conditioner.", "first_stage_model.")):
        kind, fix = ": it is a whole checkpoint", "give it as the model"
    elif first.startswith(("controlnet_", "control_model.", "down_blocks.", "input_hint_block.")):
        kind, fix = ": it is a ControlNet, which is a network of another kind", "give it as control_net_models"
    raise UserError(f"this is no ControlNet-LLLite{kind} (the first other tensor: {first})", where, fix)


def group_tensors(
    tensors: Mapping[str, Tensor], *, widths: Mapping[str, int], where: str
) -> dict[str, dict[str, Tensor]]:
    """Tensors by module and by their name within it.

    widths: the input widths of the model's layers, by the names of their modules. Raises UserError for files of another
    kind or for another model, and for values that are not finite.
    """
    refuse_other_kinds(tensors, where=where)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, tail = key.partition(".")
        modules.setdefault(name, {})[tail] = tensor
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            what = f'"{key}" holds values that are not finite (NaN or infinite)'
            raise UserError(what, where, "the network broke while it was trained: use an earlier save of it")
    _check_widths(modules, widths, where=where)
    others = [name for name in modules if name not in widths]
    if others:
        what = f"{len(others)} of its {len(modules)} modules are not in this model (the first: {others[0]})"
        raise UserError(what, where, _FIX)
    return modules


def _check_widths(modules: Mapping[str, Mapping[str, Tensor]], widths: Mapping[str, int], *, where: str) -> None:
    for name, values in modules.items():
        have = values[_DOWN].shape[-1] if _DOWN in values else None
        if name in widths and have not in (None, widths[name]):
            what = f"{name} is made for a layer of {have} numbers, this model's has {widths[name]}"
            raise UserError(f"{what}: the LLLite was trained on another model", where, _FIX)


def check_fit(
    expected: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, Mapping[str, Tensor]], *, where: str
) -> None:
    """Raise UserError unless every module has the tensors, in the shapes, that the model's module of that name has."""
    for name, values in modules.items():
        for tail, wanted in expected[name].items():
            if tail not in values:
                raise UserError(f'"{name}.{tail}" is missing', where, "the file is incomplete: get it again")
            have, want = tuple(values[tail].shape), tuple(wanted.shape)
            if have != want:
                raise UserError(f"{name}.{tail} has shape {have}, this model needs {want}", where, _FIX)
        extra = values.keys() - expected[name].keys()
        if extra:
            raise UserError(f'"{name}.{min(extra)}" is not a tensor of a ControlNet-LLLite', where, _FIX)
