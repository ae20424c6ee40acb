"""--network_args: typed, checked and refused by name, without importing torch.

sd-scripts passes these as strings and ignores what it does not know; here every key acts or is refused.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from library.config.block_weights import NUM_U_NET_BLOCKS
from library.errors import Problem, UserError
from networks._blocks import WEIGHT_COUNTS, block_weights, parse_weights
from networks._rules import TargetRule, parse_rules

_CONV = ("conv_dim", "conv_alpha")
_DROPOUTS = ("dropout", "rank_dropout", "module_dropout")
_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
_BLOCK_SIZES = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
_BLOCK_RATES = (*WEIGHT_COUNTS, "block_lr_zero_threshold")
_SIZED = (*_BLOCK_SIZES, *_BLOCK_RATES, "target_rules", "rs_lora")

# The keys that each kind of network understands.
KEYS_OF_KIND: dict[str, tuple[str, ...]] = {
    "lora": (*_CONV, *_DROPOUTS, *_PLUS, *_SIZED),
    "dora": (*_CONV, *_DROPOUTS, *_PLUS, *_SIZED, "wd_on_output"),
    "lora_fa": (*_CONV, *_DROPOUTS, *_SIZED),
    "dylora": (*_CONV, *_PLUS, "unit"),
    "oft": ("enable_all_linear", "enable_conv"),
}
# What a file decides under --dim_from_weights.
_OF_THE_FILE = frozenset(
    (*_CONV, *_BLOCK_SIZES, "target_rules", "rs_lora", "wd_on_output", "enable_all_linear", "enable_conv")
)


@dataclass(frozen=True)
class LoraArgs:
    """The network_args of all kinds; None means not given. Which of them a kind understands: KEYS_OF_KIND.

    conv_block_dims and the other lists have 23 entries, one for each U-Net block; *_lr_weight have 9, 3 and 9.
    """

    conv_dim: int | None = None
    conv_alpha: float = 1.0
    dropout: float | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    down_lr_weight: tuple[float, ...] | None = None
    mid_lr_weight: tuple[float, ...] | None = None
    up_lr_weight: tuple[float, ...] | None = None
    block_lr_zero_threshold: float = 0.0
    target_rules: tuple[TargetRule, ...] = ()
    rs_lora: bool = False
    wd_on_output: bool = True
    unit: int = 1
    enable_all_linear: bool = False
    enable_conv: bool = False

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        """The factor of each U-Net block's learning rate, 23 of them; None: one rate for all."""
        return block_weights(
            self.down_lr_weight, self.mid_lr_weight, self.up_lr_weight, threshold=self.block_lr_zero_threshold
        )

    @property
    def has_conv(self) -> bool:
        """Whether the U-Net's ResNet and sampler blocks are adapted as well."""
        return self.conv_dim is not None or self.conv_block_dims is not None

    def plus_ratio(self, part: str) -> float | None:
        """LoRA+: how much faster the up weights of a part ("unet", "te1", "te2") learn; None: as fast."""
        own = self.loraplus_unet_lr_ratio if part == "unet" else self.loraplus_text_encoder_lr_ratio
        return own if own is not None else self.loraplus_lr_ratio


def problems_of(
    module: str | None,
    args: Mapping[str, str],
    network_dropout: float | None,
    network_dim: int | None = None,
    dim_from_weights: bool = False,
) -> list[Problem]:
    """What is wrong with --network_args for one of this suite's modules; nothing is known about other modules."""
    kind = (module or "").removeprefix("networks.")
    if kind not in KEYS_OF_KIND:
        return []
    try:
        parsed = lora_args(args, kind)
        neuron_dropout(parsed, network_dropout, kind)
        if dim_from_weights:
            check_from_weights(args)
        else:
            check_sizes(parsed, kind, dim=network_dim)
    except UserError as error:
        return list(error.problems)
    return []


def lora_args(args: Mapping[str, str], kind: str = "lora") -> LoraArgs:
    """The typed arguments of a kind; raises UserError with every wrong key and value."""
    values: dict[str, Any] = {}
    problems = []
    for key, text in args.items():
        if key not in KEYS_OF_KIND[kind]:
            problems.append(_refused(key, kind))
            continue
        try:
            values[key] = _PARSERS[key](str(text).strip())
        except ValueError as error:
            problems.append(Problem(f"{key}={text}: {error}", "network_args"))
    problems += _alone(args)
    if problems:
        raise UserError.from_problems(problems)
    return LoraArgs(**values)


def check_sizes(args: LoraArgs, kind: str, *, dim: int | None) -> None:
    """Raise UserError for sizes that do not go together; dim is --network_dim (None: the kind's default, 4)."""
    dim = dim or 4
    if kind == "dylora":
        if dim % args.unit:
            raise UserError(f"unit={args.unit} does not divide the rank {dim}", "network_args", "set a unit that does")
        if args.conv_dim not in (None, dim):
            raise UserError(
                f"conv_dim={args.conv_dim} differs from network_dim {dim}: DyLoRA has one rank",
                "network_args",
                f"set conv_dim={dim}",
            )
    if args.block_dims is not None and not any(args.block_dims):
        raise UserError("block_dims is 0 for every block", "network_args", "give some block a rank")
    if args.block_rates is not None and not any(args.block_rates[1:-1]):
        raise UserError(
            "the block weights are 0 for every block", "network_args", "use --network_train_text_encoder_only instead"
        )


def check_from_weights(args: Mapping[str, str]) -> None:
    """Raise UserError for arguments that a file decides when the ranks come from it."""
    decided = [key for key in args if key in _OF_THE_FILE]
    if decided:
        raise UserError(
            f"{', '.join(decided)} cannot be used with dim_from_weights: the file decides it",
            "network_args",
            "remove it, or dim_from_weights",
        )


def neuron_dropout(args: LoraArgs, network_dropout: float | None, kind: str = "lora") -> float:
    """The dropout in force: --network_dropout and network_args "dropout" name the same thing."""
    if network_dropout and "dropout" not in KEYS_OF_KIND[kind]:
        raise UserError(f"networks.{kind} has no dropout", "network_dropout", "remove it")
    if args.dropout is not None and network_dropout is not None and args.dropout != network_dropout:
        raise UserError(
            f"dropout is {network_dropout} in network_dropout and {args.dropout} in network_args",
            "network_args",
            "give it in one place",
        )
    return args.dropout if args.dropout is not None else network_dropout or 0.0


def _alone(args: Mapping[str, str]) -> list[Problem]:
    """Keys that have no effect without another one."""
    needs = {
        "conv_alpha": (("conv_dim", "conv_block_dims"), "add conv_dim=N"),
        "conv_block_alphas": (("conv_dim", "conv_block_dims"), "add conv_block_dims"),
        "block_lr_zero_threshold": (tuple(WEIGHT_COUNTS), "add down_lr_weight, mid_lr_weight or up_lr_weight"),
    }
    return [
        Problem(f"{key} is given without {others[0]}", "network_args", fix)
        for key, (others, fix) in needs.items()
        if key in args and not any(other in args for other in others)
    ]


def _refused(key: str, kind: str) -> Problem:
    owners = [other for other, keys in KEYS_OF_KIND.items() if key in keys]
    known = KEYS_OF_KIND[kind]
    if owners:
        reason = ": its down weights do not train, so there is nothing to be faster than" if key in _PLUS else ""
        where = ", ".join(f"networks.{owner}" for owner in owners)
        return Problem(
            f'"{key}" is not an argument of networks.{kind}{reason}',
            "network_args",
            f"remove it; it belongs to {where}",
        )
    near = difflib.get_close_matches(key, known, n=1)
    fix = f'did you mean "{near[0]}"?' if near else "known: " + ", ".join(known)
    return Problem(f'"{key}" is not known', "network_args", fix)


def _rank(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise ValueError("must be 1 or more")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def _alpha(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise ValueError("must be 0 (which means: equal to the rank) or more")
    return value


def _ratio(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise ValueError("must be above 0")
    return value


def _threshold(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise ValueError("must be 0 or more")
    return value


def _probability(text: str) -> float:
    if text.lower() in ("", "none"):
        return 0.0
    value = _number(text)
    if not 0 <= value < 1:
        raise ValueError("must be 0 or more and below 1")
    return value


def _boolean(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if text.lower() not in known:
        raise ValueError("must be true or false")
    return known[text.lower()]


def _per_block(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def read(text: str) -> tuple[Any, ...]:
        values = tuple(parse(item.strip()) for item in text.split(","))
        if len(values) != NUM_U_NET_BLOCKS:
            raise ValueError(f"has {len(values)} values; SDXL's U-Net has {NUM_U_NET_BLOCKS} blocks")
        return values

    return read


def _block_rank(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise ValueError("must be 0 (which means: not adapted) or more")
    return value


_PARSERS: dict[str, Callable[[str], Any]] = {
    "conv_dim": _rank,
    "conv_alpha": _alpha,
    **dict.fromkeys(_DROPOUTS, _probability),
    **dict.fromkeys(_PLUS, _ratio),
    **dict.fromkeys(("block_dims", "conv_block_dims"), _per_block(_block_rank)),
    **dict.fromkeys(("block_alphas", "conv_block_alphas"), _per_block(_alpha)),
    **{key: partial(parse_weights, count=count) for key, count in WEIGHT_COUNTS.items()},
    "block_lr_zero_threshold": _threshold,
    "target_rules": parse_rules,
    "unit": _rank,
    **dict.fromkeys(("rs_lora", "wd_on_output", "enable_all_linear", "enable_conv"), _boolean),
}
assert set(_PARSERS) == {field.name for field in fields(LoraArgs)}
