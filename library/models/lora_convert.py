"""Convert LoRA files among sd-scripts' names, the same with diffusers' names, diffusers' own and PEFT's layout.

Nothing is rounded: tensors change their names, and DoRA's magnitudes their shape. What a layout has no tensor for goes
to the header, so that converting there and back gives the same tensors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.models.keymaps.lora import DOTTED_PREFIXES, LoraModule, LoraPart, Naming
from library.models.keymaps.text import TEXT_MODEL
from library.models.lora_files import ALPHA, ALPHA_HEADER, DORA, DOWN, PEFT_HEADER, UP, LazyTensors, LoraFile
from library.models.tensors import shape_of

MAGNITUDE = "lora_magnitude_vector"
# With `.weight`, which diffusers' loader of text encoders needs; PEFT's own adapters are written without.
_DOTTED = {DOWN: "lora_A.weight", UP: "lora_B.weight", DORA: MAGNITUDE + ".weight"}
_HASHES = ("sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True)
class Converted:
    """Tensors (lazy) and header texts of the new file; `notes` say what changed its place or got lost."""

    tensors: LazyTensors
    metadata: dict[str, str]
    notes: list[str] = field(default_factory=list)


def convert(lora: LoraFile, naming: Naming, *, fold_alpha: bool = False) -> Converted:
    """`lora` under another naming.

    fold_alpha (diffusers only): multiply lora_B by alpha / rank instead of writing alpha to the header, for programs
    that do not read it. Raises UserError for what the layout has no place for.
    """
    return _dotted(lora, fold_alpha=fold_alpha) if naming == "diffusers" else _underscored(lora, naming)


def peft_configs(lora: LoraFile, *, folded: bool = False) -> dict[LoraPart, dict[str, Any]]:
    """PEFT's LoRA configuration of each part: rank and alpha of most modules, and patterns for the others.

    Names leave out `text_model.`, which transformers' CLIPTextModel has or has not by version: PEFT compares the ends
    of names. Raises UserError when only some modules of a part are DoRA, which one configuration cannot say.
    """
    configs: dict[LoraPart, dict[str, Any]] = {}
    for part in DOTTED_PREFIXES:
        members = [module for module in lora.modules if module.part == part]
        if not members:
            continue
        names = {module: module.path.removeprefix(TEXT_MODEL) for module in members}
        ranks = {names[module]: lora.rank(module) for module in members}
        alphas = {names[module]: float(lora.rank(module)) if folded else lora.alpha(module) for module in members}
        rank, alpha = _most_common(ranks), _most_common(alphas)
        with_dora = [module for module in members if DORA in lora.modules[module]]
        if with_dora and len(with_dora) < len(members):
            plain = next(module for module in members if DORA not in lora.modules[module])
            raise UserError(
                f"{plain.path} has no dora_scale while others have one; diffusers knows DoRA for all modules of a "
                "part or for none",
                lora.where,
                "keep the file in sd-scripts' naming",
            )
        configs[part] = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
            "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
            "target_modules": sorted(ranks),
            "use_dora": bool(with_dora),
        }
    return configs


def _dotted(lora: LoraFile, *, fold_alpha: bool) -> Converted:
    makers: dict[str, Callable[[], Tensor]] = {}
    for module, tails in lora.modules.items():
        for tail, key in tails.items():
            if tail == ALPHA:
                continue
            if tail not in _DOTTED:
                raise UserError(
                    f"{key} has no place in diffusers' layout, which holds LoRA and DoRA only",
                    lora.where,
                    "choose sd-scripts or sd-scripts-diffusers; these keep every kind of adapter",
                )
            make = partial(lora.source.__getitem__, key)
            if tail == DORA:
                make = partial(_magnitude, lora, module, key)
            elif tail == UP and fold_alpha:
                make = partial(_folded, lora, module, key)
            makers[f"{module.named('diffusers')}.{_DOTTED[tail]}"] = make
    configs = peft_configs(lora, folded=fold_alpha)
    flat = {
        f"{DOTTED_PREFIXES[part]}.{key}": value for part, config in configs.items() for key, value in config.items()
    }
    metadata = {key: value for key, value in lora.metadata.items() if key not in _HASHES}
    metadata |= {"format": "pt", PEFT_HEADER: json.dumps(flat, sort_keys=True)}
    notes = []
    if fold_alpha:
        metadata.pop(ALPHA_HEADER, None)
        notes.append("alpha is multiplied into lora_B: its own value is lost, and lora_B is rounded to its precision")
    elif not lora.dotted:
        metadata[ALPHA_HEADER] = _alpha_record(lora)
        notes.append(
            f"alpha stands in the header ({PEFT_HEADER}): programs that do not read it take alpha for the rank"
        )
    if any(key in lora.metadata for key in _HASHES):
        notes.append("sshs_ hashes belong to sd-scripts' naming and are left out")
    return Converted(LazyTensors(makers), metadata, notes)


def _underscored(lora: LoraFile, naming: Naming) -> Converted:
    makers: dict[str, Callable[[], Tensor]] = {}
    recorded = _recorded_alphas(lora)
    for module, tails in lora.modules.items():
        name = module.named(naming)
        for tail, key in tails.items():
            make = partial(lora.source.__getitem__, key)
            makers[f"{name}.{tail}"] = partial(_scale_of, lora, module, key) if tail == DORA and lora.dotted else make
        if lora.dotted and ALPHA not in tails:
            alpha = recorded.get(module.named("sd-scripts"), recorded.get("*", (lora.alpha(module), "float32")))
            if alpha is not None:
                makers[f"{name}.{ALPHA}"] = partial(torch.tensor, alpha[0], dtype=getattr(torch, alpha[1]))
    metadata = {key: value for key, value in lora.metadata.items() if key not in (PEFT_HEADER, ALPHA_HEADER)}
    notes = []
    bare = sum(ALPHA not in tails and DOWN in tails for tails in lora.modules.values())
    if bare and not lora.dotted:
        notes.append(f"{bare} modules have no alpha, here as there: readers take the rank")
    unsaid = sum(not lora.says_alpha(module) for module, tails in lora.modules.items() if DOWN in tails)
    if lora.dotted and not recorded and unsaid:
        notes.append(f"the file says nothing about alpha of {unsaid} modules: written as their rank")
    return Converted(LazyTensors(makers), metadata, notes)


def _magnitude(lora: LoraFile, module: LoraModule, key: str) -> Tensor:
    """DoRA's per-output magnitudes in PEFT's shape: (out) for a linear layer, (1, out, 1, 1) for a convolution."""
    scale = lora.source[key]
    out = shape_of(lora.source, lora.modules[module][UP])[0]
    if scale.numel() != out or (not lora.dotted and scale.ndim > 1 and scale.shape[0] != out):
        raise UserError(
            f"{key} has shape {tuple(scale.shape)}: its magnitudes belong to inputs, PEFT's to the {out} outputs",
            lora.where,
            "keep the file in sd-scripts' naming",
        )
    is_conv = len(shape_of(lora.source, lora.modules[module][DOWN])) == 4
    return scale.reshape(1, out, 1, 1) if is_conv else scale.reshape(out)


def _scale_of(lora: LoraFile, module: LoraModule, key: str) -> Tensor:
    """PEFT's magnitudes in the shape of `dora_scale`: (out, 1), for a convolution (out, 1, 1, 1)."""
    magnitude = lora.source[key]
    ndim = len(shape_of(lora.source, lora.modules[module][DOWN]))
    return magnitude.reshape(-1, *[1] * (ndim - 1))


def _folded(lora: LoraFile, module: LoraModule, key: str) -> Tensor:
    up = lora.source[key]
    return (up.float() * (lora.alpha(module) / lora.rank(module))).to(up.dtype)


def _alpha_record(lora: LoraFile) -> str:
    """Alpha tensors as JSON, value and dtype by sd-scripts' name; "*" stands for all names that are not listed."""
    found: dict[str, tuple[float | int, str] | None] = {}
    for module, tails in lora.modules.items():
        tensor = lora.source[tails[ALPHA]] if ALPHA in tails else None
        value = None if tensor is None else (tensor.item(), str(tensor.dtype).removeprefix("torch."))
        found[module.named("sd-scripts")] = value
    common = _most_common(found)
    return json.dumps({"*": common} | {name: value for name, value in found.items() if value != common})


def _recorded_alphas(lora: LoraFile) -> dict[str, tuple[float | int, str] | None]:
    try:
        record = json.loads(lora.metadata.get(ALPHA_HEADER, "{}"))
        return {name: None if value is None else (value[0], str(value[1])) for name, value in record.items()}
    except (ValueError, AttributeError, TypeError, IndexError) as error:
        raise UserError(f"its header's {ALPHA_HEADER} cannot be read ({error})", lora.where) from None


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
