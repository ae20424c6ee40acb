"""Read LoRA files of any naming: which tensor belongs to which module, and what alpha is in force.

Sources of the layouts: lora_format.md section 1 for sd-scripts; diffusers' `save_lora_weights` and PEFT's adapters for
the dotted names, where alpha stands in the header (`lora_adapter_metadata`, one PEFT configuration per part).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.io.bundled import bundled, bundled_keys
from library.log import get_logger
from library.models.keymaps.lora import DOTTED_PREFIXES, LoraModule, parse_dotted, parse_underscored
from library.models.tensors import shape_of

log = get_logger(__name__)

DOWN, UP, ALPHA, DORA = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
PEFT_HEADER = "lora_adapter_metadata"
ALPHA_HEADER = "sdxl_suite.lora_alphas"

_DOTTED_TAILS = {
    "lora_A.weight": DOWN, "lora_A.default.weight": DOWN, "lora.down.weight": DOWN,
    "lora_linear_layer.down.weight": DOWN, "down.weight": DOWN,
    "lora_B.weight": UP, "lora_B.default.weight": UP, "lora.up.weight": UP,
    "lora_linear_layer.up.weight": UP, "up.weight": UP,
    "alpha": ALPHA, "dora_scale": DORA,
    "lora_magnitude_vector": DORA, "lora_magnitude_vector.weight": DORA, "lora_magnitude_vector.default.weight": DORA,
}  # fmt: skip
_TAIL = re.compile(rf"\.({'|'.join(re.escape(tail) for tail in sorted(_DOTTED_TAILS, key=len, reverse=True))})$")


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True)
class LoraFile:
    """An adapter file by module: tails (sd-scripts' names for them) -> keys of `source`, with the header's texts.

    dotted: whether the file has diffusers' or PEFT's names, in which alpha has no tensor of its own.
    """

    source: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    modules: Mapping[LoraModule, Mapping[str, str]]
    dotted: bool
    where: str
    _configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def rank(self, module: LoraModule) -> int:
        """Rows of the module's down weight."""
        return shape_of(self.source, self.modules[module][DOWN])[0]

    def says_alpha(self, module: LoraModule) -> bool:
        """Whether a tensor or the header of the file (or the folder's configuration) decides alpha."""
        config = self._configs.get(DOTTED_PREFIXES[module.part], {})
        return ALPHA in self.modules[module] or "lora_alpha" in config

    def alpha(self, module: LoraModule) -> float:
        """The alpha in force: the file's tensor, else what its header says, else the rank."""
        key = self.modules[module].get(ALPHA)
        if key is not None:
            return float(self.source[key])
        rank = self.rank(module)
        config = self._configs.get(DOTTED_PREFIXES[module.part])
        if config is None:
            return float(rank)
        found = _of_pattern(config.get("alpha_pattern") or {}, module.path, config.get("lora_alpha", rank))
        return float(found) * math.sqrt(rank) if config.get("use_rslora") else float(found)


def read_lora(
    source: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    where: str,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> LoraFile:
    """Sort a file's tensors by module and check them; weights are read once, to find values that are no numbers.

    configs: PEFT configurations by part ("unet", "text_encoder", "text_encoder_2") where the header does not hold
    them. Raises UserError for names that are no module of SDXL, a module named twice, halves that are missing or do
    not fit, rank 0, NaN and infinity.
    """
    modules: dict[LoraModule, dict[str, str]] = {}
    namings: dict[bool, str] = {}
    tokens = frozenset(bundled_keys(source))
    if tokens:
        log.warning("%s: the embeddings in it are left out: %s", where, ", ".join(sorted(bundled(source))))
    for key in (key for key in source if key not in tokens):
        dotted, module, tail = _parsed(key, where)
        namings.setdefault(dotted, key)
        tails = modules.setdefault(module, {})
        if tail in tails:
            raise UserError(f"{tails[tail]} and {key} are the same tensor", where, "remove one of them")
        tails[tail] = key
    if not modules:
        raise UserError("the file holds no tensors", where, "choose a LoRA file")
    if len(namings) > 1:
        raise UserError(
            f"the file mixes two ways of naming: {namings[False]} and {namings[True]}",
            where,
            "it was put together from two files: convert each of them by itself",
        )
    for module, tails in modules.items():
        _check_module(source, module, tails, where)
    found = dict(configs or {}) or _header_configs(metadata, where)
    return LoraFile(source, metadata, modules, True in namings, where, found)


def _parsed(key: str, where: str) -> tuple[bool, LoraModule, str]:
    """(dotted, module, tail) of one key."""
    name, _, tail = key.partition(".")
    if name.startswith("lora_te_"):
        raise UserError(
            f"it is a LoRA for Stable Diffusion 1.x or 2.x (one text encoder: {key})", where, "choose one for SDXL"
        )
    if (module := parse_underscored(name)) is not None:
        return False, module, tail
    if (found := _TAIL.search(key)) and (module := parse_dotted(key[: found.start()])) is not None:
        return True, module, _DOTTED_TAILS[found[1]]
    if key.startswith(("model.", "conditioner.", "first_stage_model.")):
        raise UserError("it is a whole checkpoint, not a LoRA", where, "use tools/convert_checkpoint.py")
    raise UserError(
        f"{key} is not a tensor of an SDXL LoRA in any naming known here",
        where,
        "names are lora_unet_…, lora_te1_…, lora_te2_…, or unet.…, text_encoder.…, text_encoder_2.… with lora_A",
    )


def _check_module(source: Mapping[str, Tensor], module: LoraModule, tails: Mapping[str, str], where: str) -> None:
    name = module.named("sd-scripts")
    for key in tails.values():
        tensor = source[key]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{key} holds values that are not finite (NaN or infinity)", where, "use an earlier save")
    if ALPHA in tails and source[tails[ALPHA]].numel() != 1:
        shape = shape_of(source, tails[ALPHA])
        raise UserError(f"{tails[ALPHA]} has shape {shape}, and is one number", where, "get the file again")
    if DOWN not in tails and UP not in tails:
        return  # another kind of adapter, which can be renamed as it is
    for tail in (DOWN, UP):
        if tail not in tails:
            raise UserError(f"{name} has no {tail}", where, "the file is incomplete: get it again")
    down, up = (shape_of(source, tails[tail]) for tail in (DOWN, UP))
    if not down[0]:
        raise UserError(f"{name} has rank 0", where, "remove its tensors, or train it with a rank of 1 or more")
    if "lora_mid.weight" not in tails and (len(up) < 2 or down[0] != up[1]):
        raise UserError(f"the halves of {name} do not fit: {down} and {up}", where, "get the file again")


def _header_configs(metadata: Mapping[str, str], where: str) -> dict[str, dict[str, Any]]:
    """PEFT configurations by part, out of the header's flat table `part.option`."""
    if PEFT_HEADER not in metadata:
        return {}
    configs: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(metadata[PEFT_HEADER]).items():
            part, _, option = key.partition(".")
            configs.setdefault(part, {})[option] = value
    except (ValueError, AttributeError) as error:
        raise UserError(f"its header's {PEFT_HEADER} cannot be read ({error})", where, "get the file again") from None
    return configs


def _of_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the path, from a dot on, as a regular expression."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
