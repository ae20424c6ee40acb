"""Reading adapter files: whose format it is, which module each tensor belongs to, whether the shapes fit."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from library.errors import UserError
from networks._keys import Target

LORA_KEYS = frozenset({"lora_down.weight", "lora_up.weight", "alpha"})

# A tail of a tensor name -> what such a file is, for files that other programs or other adapter types write.
FOREIGN_KINDS = {
    "dora_scale": "a DoRA",
    "lora_mid.weight": "a LoCon with Tucker decomposition",
    "hada_w1_a": "a LoHa",
    "hada_w2_a": "a LoHa",
    "lokr_w1": "a LoKr",
    "lokr_w1_a": "a LoKr",
    "lokr_w2": "a LoKr",
    "lokr_w2_a": "a LoKr",
    "oft_blocks": "an OFT",
    "oft_diag": "an OFT",
    "a1.weight": "a GLoRA",
    "on_input": "an IA3",
    "diff": "a LyCORIS full-weight",
}
PEFT_MARKS = (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "lora_linear_layer")


def group_tensors(
    tensors: Mapping[str, Tensor], targets: Iterable[Target], *, where: str
) -> dict[str, dict[str, Tensor]]:
    """Tensors by module name (sd-scripts' name when the module is known) and tail.

    Raises UserError for files of SD 1.x / 2.x, of other adapter types, in PEFT's layout, and for plain models.
    """
    _refuse_foreign(tensors, where)
    names = {}
    for target in targets:
        names[target.name] = names[target.alias] = target.name
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, tail = key.partition(".")
        values = modules.setdefault(names.get(module, module), {})
        if tail in values:
            raise UserError(f'"{names[module]}" is in the file under two names', where, "remove one of them")
        values[tail] = tensor
    if not modules:
        raise UserError("the file holds no tensors", where, "choose a LoRA file")
    _refuse_other_models(modules, set(names.values()), where)
    for name, values in modules.items():
        _check_complete(name, values, where)
    return modules


def _refuse_other_models(modules: Iterable[str], known: set[str], where: str) -> None:
    """Raise UserError when a part of the file (its U-Net, say) names nothing in the model's same part."""
    parts: dict[str, list[str]] = {}
    for name in modules:
        parts.setdefault(_prefix(name), []).append(name)
    here = {_prefix(name) for name in known}
    for part, names in parts.items():
        if known.isdisjoint(names) and (part in here or here.isdisjoint(parts)):
            raise UserError(
                f"none of its {len(names)} modules {part}_… is in this model (the first: {names[0]})",
                where,
                "choose a LoRA made for SDXL (names lora_unet_…, lora_te1_…, lora_te2_…)",
            )


def _prefix(name: str) -> str:
    return "_".join(name.split("_")[:2])


def check_fit(adapters: Mapping[str, nn.Module], modules: Mapping[str, Mapping[str, Tensor]], *, where: str) -> None:
    """Raise UserError unless every tensor has the shape that its adapter expects (alpha may have any)."""
    for name, values in modules.items():
        expected = adapters[name].state_dict()
        for tail, tensor in values.items():
            have, want = tuple(tensor.shape), tuple(expected[tail].shape)
            if have == want or tail == "alpha":
                continue
            rank_have, rank_want = _rank_of(tail, have), _rank_of(tail, want)
            if _without_rank(tail, have) != _without_rank(tail, want):
                raise UserError(
                    f"{name}.{tail} has shape {have}, this model needs {want}",
                    where,
                    "choose a file made for this model's widths",
                )
            raise UserError(
                f"{name} has rank {rank_have} in the file, the network has {rank_want}",
                where,
                f"set network_dim (conv_dim for 3x3 convolutions) to {rank_have}, or use dim_from_weights",
            )


def check_widths(targets: Mapping[str, Target], modules: Mapping[str, Mapping[str, Tensor]], *, where: str) -> None:
    """Raise UserError unless the down and up weights have the widths of the modules that they name."""
    for name, values in modules.items():
        down, up = values["lora_down.weight"], values["lora_up.weight"]
        base = targets[name].module.weight
        rank = down.shape[0]
        want_down, want_up = (rank, *base.shape[1:]), (base.shape[0], rank, *[1] * (base.ndim - 2))
        for tail, have, want in (("lora_down.weight", down, want_down), ("lora_up.weight", up, want_up)):
            if tuple(have.shape) != want:
                raise UserError(
                    f"{name}.{tail} has shape {tuple(have.shape)}, this model needs {want}",
                    where,
                    "choose a file made for this model's widths",
                )


def _rank_of(tail: str, shape: tuple[int, ...]) -> int:
    return shape[0] if tail == "lora_down.weight" else shape[1]


def _without_rank(tail: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if tail == "lora_down.weight" else (shape[0], *shape[2:])


def _check_complete(name: str, values: Mapping[str, Tensor], where: str) -> None:
    for tail in values:
        if tail not in LORA_KEYS:
            raise UserError(f'"{name}.{tail}" is not a tensor of a LoRA', where, "choose a LoRA file")
    for tail in ("lora_down.weight", "lora_up.weight"):
        if tail not in values:
            raise UserError(f'"{name}.{tail}" is missing', where, "the file is incomplete: get it again")


def _refuse_foreign(tensors: Mapping[str, Tensor], where: str) -> None:
    for key in tensors:
        module, _, tail = key.partition(".")
        if module.startswith("lora_te_"):
            raise UserError(
                "it is a LoRA for Stable Diffusion 1.x or 2.x (it has one text encoder, lora_te_…)",
                where,
                "choose a LoRA made for SDXL",
            )
        if tail in FOREIGN_KINDS:
            raise UserError(f"it is {FOREIGN_KINDS[tail]} file, which is not supported yet", where, "choose a LoRA")
        if any(mark in key for mark in PEFT_MARKS):
            raise UserError(
                "it is a LoRA in the layout of diffusers or PEFT, which is not supported yet",
                where,
                "convert it to sd-scripts' layout (lora_unet_….lora_down.weight) first",
            )
        if module in ("model", "conditioner", "first_stage_model", "cond_stage_model"):
            raise UserError("it is a whole checkpoint, not a LoRA", where, "give it as the model, not as a network")
