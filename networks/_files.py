"""Reading adapter files: whose format it is, which module each tensor belongs to, whether the shapes fit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.io.bundled import bundled_keys
from library.log import get_logger
from networks._keys import Target

logger = get_logger(__name__)


@dataclass(frozen=True)
class FileFormat:
    """What the tensors of one kind's modules are called in a file, after the module's name and a dot.

    title: "a LoRA". kinds: the modules that read it. mark: a tensor that only this format has; None for plain LoRA.
    """

    title: str
    kinds: tuple[str, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    mark: str | None = None


LORA = FileFormat(
    "a LoRA",
    ("networks.lora", "networks.lora_fa", "networks.dylora"),
    required=("lora_down.weight", "lora_up.weight"),
    optional=("alpha",),
)
DORA = FileFormat(
    "a DoRA",
    ("networks.dora",),
    required=("lora_down.weight", "lora_up.weight", "dora_scale"),
    optional=("alpha",),
    mark="dora_scale",
)
OFT = FileFormat("an OFT", ("networks.oft",), required=("oft_blocks", "alpha"), mark="oft_blocks")
FORMATS = (LORA, DORA, OFT)

LORA_KEYS = frozenset({*LORA.required, *LORA.optional})
# The prefixes of module names that this suite knows.
PREFIXES = frozenset({"lora_unet", "lora_te1", "lora_te2", "oft_unet"})

# A tail of a tensor name -> what such a file is, for files that other programs write.
FOREIGN_KINDS = {
    "lora_mid.weight": "a LoCon with Tucker decomposition",
    "hada_w1_a": "a LoHa",
    "hada_w2_a": "a LoHa",
    "lokr_w1": "a LoKr",
    "lokr_w1_a": "a LoKr",
    "lokr_w2": "a LoKr",
    "lokr_w2_a": "a LoKr",
    "oft_diag": "an OFT of another program",
    "rescale": "an OFT of another program",
    "a1.weight": "a GLoRA",
    "on_input": "an IA3",
    "diff": "a LyCORIS full-weight",
}
PEFT_MARKS = (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "lora_linear_layer")


def format_of(tensors: Iterable[str]) -> FileFormat:
    """The format that a file's tensor names speak of; plain LoRA when none of the marks is there."""
    tails = {key.partition(".")[2] for key in tensors}
    return next((form for form in FORMATS if form.mark in tails), LORA)


def group_tensors(
    tensors: Mapping[str, Tensor], targets: Iterable[Target], *, where: str, form: FileFormat = LORA
) -> dict[str, dict[str, Tensor]]:
    """Tensors by module name (sd-scripts' name when the module is known) and tail.

    Raises UserError for files of SD 1.x / 2.x, of other adapter types than `form`, in PEFT's layout, for plain models,
    for names of several programs in one file, and for values that are not finite. Embeddings are left out.
    """
    tokens = frozenset(bundled_keys(tensors))
    if tokens:
        tensors = {key: tensors[key] for key in tensors if key not in tokens}
    _refuse_foreign(tensors, where, form)
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
        _check_complete(name, values, where, form)
    _note_missing_alphas(modules, where)
    return modules


def _note_missing_alphas(modules: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
    missing = [name for name, values in modules.items() if "alpha" not in values]
    if missing:
        logger.warning(
            "%s: %d of its %d modules have no alpha, which then is the rank, so that they act in full (the first: %s)",
            where,
            len(missing),
            len(modules),
            missing[0],
        )


def _refuse_other_models(modules: Iterable[str], known: set[str], where: str) -> None:
    """Raise UserError when a part of the file (its U-Net, say) names nothing in the model's same part."""
    parts: dict[str, list[str]] = {}
    for name in modules:
        parts.setdefault(_prefix(name), []).append(name)
    here = {_prefix(name) for name in known}
    others = {part: names for part, names in parts.items() if part not in here | PREFIXES}
    if others and not (here | PREFIXES).isdisjoint(parts):
        part, names = next(iter(others.items()))
        raise UserError(
            f"it mixes names of several programs: {len(names)} of its modules begin with {part}_ (the first: "
            f"{names[0]}), the others with {', '.join(f'{other}_' for other in parts if other not in others)}",
            where,
            "get the file again from where it was made, or remove what does not belong to SDXL",
        )
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
            size = _size_axis(tail)
            if size is None:
                raise UserError(
                    f"{name}.{tail} has shape {have}, the network has {want}",
                    where,
                    "set network_args wd_on_output as the file was made, or use dim_from_weights",
                )
            if not _same_but_for_size(tail, have, want):
                raise UserError(
                    f"{name}.{tail} has shape {have}, this model needs {want}",
                    where,
                    "choose a file made for this model's widths",
                )
            what = "blocks" if tail == "oft_blocks" else "rank"
            raise UserError(
                f"{name} has {what} {have[size]} in the file, the network has {want[size]}",
                where,
                f"set network_dim (conv_dim for 3x3 convolutions) to {have[size]}, or use dim_from_weights",
            )


def check_module(values: Mapping[str, Tensor], target: Target, *, where: str, form: FileFormat) -> None:
    """Raise UserError unless one module's tensors are all that `form` has, finite, and of the target's widths."""
    _check_complete(target.name, values, where, form)
    check_widths({target.name: target}, {target.name: values}, where=where)


def check_widths(targets: Mapping[str, Target], modules: Mapping[str, Mapping[str, Tensor]], *, where: str) -> None:
    """Raise UserError unless the tensors have the widths of the modules that they name."""
    for name, values in modules.items():
        if "oft_blocks" in values:
            _check_blocks(name, values["oft_blocks"], targets[name].module.weight, where)
            continue
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
        magnitudes = values.get("dora_scale")
        if magnitudes is not None and tuple(magnitudes.shape) not in _magnitude_shapes(base):
            raise UserError(
                f"{name}.dora_scale has shape {tuple(magnitudes.shape)}, this model needs one of "
                f"{' and '.join(map(str, _magnitude_shapes(base)))}",
                where,
                "choose a file made for this model's widths",
            )


def _magnitude_shapes(base: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One magnitude for each output, or one for each input."""
    ones = [1] * (base.ndim - 2)
    return (base.shape[0], 1, *ones), (1, base.shape[1], *ones)


def _check_blocks(name: str, blocks: Tensor, base: Tensor, where: str) -> None:
    have = tuple(blocks.shape)
    if blocks.ndim != 3 or have[1] != have[2] or have[0] * have[1] != base.shape[0]:
        raise UserError(
            f"{name}.oft_blocks has shape {have}; its blocks must make up the module's {base.shape[0]} outputs",
            where,
            "choose a file made for this model's widths",
        )


def _size_axis(tail: str) -> int | None:
    """Which axis of a tensor tells the rank (or the number of blocks)."""
    return {"lora_down.weight": 0, "lora_up.weight": 1, "oft_blocks": 0}.get(tail)


def _same_but_for_size(tail: str, have: tuple[int, ...], want: tuple[int, ...]) -> bool:
    if tail == "oft_blocks":
        return len(have) == 3 and have[0] * have[1] == want[0] * want[1] and have[1] == have[2]
    axis = _size_axis(tail)
    return len(have) == len(want) and all(i == axis or a == b for i, (a, b) in enumerate(zip(have, want, strict=True)))


def _check_complete(name: str, values: Mapping[str, Tensor], where: str, form: FileFormat) -> None:
    known = (*form.required, *form.optional)
    for tail, tensor in values.items():
        if tail not in known:
            raise UserError(f'"{name}.{tail}" is not a tensor of {form.title}', where, f"choose {form.title} file")
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            raise UserError(
                f'"{name}.{tail}" holds values that are not finite (NaN or infinite)',
                where,
                "the network broke while it was trained: use an earlier save of it",
            )
        if tail == "alpha" and tensor.numel() != 1:
            raise UserError(
                f'"{name}.alpha" has shape {tuple(tensor.shape)}, and is one number', where, "get the file again"
            )
        if tensor.ndim and not tensor.numel():
            raise UserError(
                f'"{name}.{tail}" is empty, shape {tuple(tensor.shape)}: a rank of 0', where, "get the file again"
            )
    for tail in form.required:
        if tail not in values:
            raise UserError(f'"{name}.{tail}" is missing', where, "the file is incomplete: get it again")


def _refuse_foreign(tensors: Mapping[str, Tensor], where: str, form: FileFormat) -> None:
    for key in tensors:
        module, _, tail = key.partition(".")
        if module.startswith("lora_te_"):
            raise UserError(
                "it is a LoRA for Stable Diffusion 1.x or 2.x (it has one text encoder, lora_te_…)",
                where,
                "choose a LoRA made for SDXL",
            )
        if module.startswith("lllite_unet_"):
            what = "it is a ControlNet-LLLite, which is steered by pictures and changes no weights"
            raise UserError(what, where, "give it as control_net_lllite_models")
        if tail in FOREIGN_KINDS:
            raise UserError(f"it is {FOREIGN_KINDS[tail]} file, which {form.kinds[0]} cannot read", where, _WAY_OUT)
        if tail == OFT.mark and module.startswith("lora_"):
            raise UserError(
                "it is an OFT of LyCORIS (diag-oft or boft), which networks.oft does not read",
                where,
                "use network_module lycoris.kohya",
            )
        if any(mark in key for mark in PEFT_MARKS):
            raise UserError(
                "it is a LoRA in the layout of diffusers or PEFT, which is not read here",
                where,
                "convert it with tools/convert_lora.py --to sd-scripts",
            )
        if module in ("model", "conditioner", "first_stage_model", "cond_stage_model"):
            raise UserError("it is a whole checkpoint, not a LoRA", where, "give it as the model, not as a network")
    found = format_of(tensors)
    if len(tensors) and found is not form:
        raise UserError(
            f"it is {found.title} file, the network module {form.kinds[0]} reads {form.title}",
            where,
            f"use network_module {found.kinds[0]}",
        )


_WAY_OUT = "choose a file of a kind that networks/ has, or the network module of the program that made it"
