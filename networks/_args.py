"""--network_args: typed, checked and refused by name, without importing torch.

sd-scripts passes these as strings and ignores what it does not know; here every key acts or is refused.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from library.errors import Problem, UserError

# sd-scripts' keys of networks.lora that have no effect here yet (lora_format.md §1, block_lr.md §2).
NOT_YET = frozenset(
    {
        "block_dims",
        "block_alphas",
        "conv_block_dims",
        "conv_block_alphas",
        "down_lr_weight",
        "mid_lr_weight",
        "up_lr_weight",
        "block_lr_zero_threshold",
        "loraplus_lr_ratio",
        "loraplus_unet_lr_ratio",
        "loraplus_text_encoder_lr_ratio",
    }
)


@dataclass(frozen=True)
class LoraArgs:
    """The network_args of networks.lora; None means not given."""

    conv_dim: int | None = None
    conv_alpha: float = 1.0
    dropout: float | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0


def problems_of(module: str | None, args: Mapping[str, str], network_dropout: float | None) -> list[Problem]:
    """What is wrong with --network_args for one of this suite's modules; nothing is known about other modules."""
    if module not in ("lora", "networks.lora"):
        return []
    try:
        neuron_dropout(lora_args(args), network_dropout)
    except UserError as error:
        return list(error.problems)
    return []


def lora_args(args: Mapping[str, str]) -> LoraArgs:
    """The typed arguments of networks.lora; raises UserError with every wrong key and value."""
    values: dict[str, int | float] = {}
    problems = []
    for key, text in args.items():
        parse = _LORA_KEYS.get(key)
        if parse is None:
            problems.append(_refused(key))
            continue
        try:
            values[key] = parse(str(text).strip())
        except ValueError as error:
            problems.append(Problem(f"{key}={text}: {error}", "network_args"))
    if "conv_alpha" in values and "conv_dim" not in args:
        problems.append(Problem("conv_alpha is given without conv_dim", "network_args", "add conv_dim=N"))
    if problems:
        raise UserError.from_problems(problems)
    return LoraArgs(**values)  # type: ignore[arg-type]


def neuron_dropout(args: LoraArgs, network_dropout: float | None) -> float:
    """The dropout in force: --network_dropout and network_args "dropout" name the same thing."""
    if args.dropout is not None and network_dropout is not None and args.dropout != network_dropout:
        raise UserError(
            f"dropout is {network_dropout} in network_dropout and {args.dropout} in network_args",
            "network_args",
            "give it in one place",
        )
    return args.dropout if args.dropout is not None else network_dropout or 0.0


def _refused(key: str) -> Problem:
    if key in NOT_YET:
        return Problem(f'"{key}" is not supported yet', "network_args", "leave it out")
    near = difflib.get_close_matches(key, [*_LORA_KEYS, *NOT_YET], n=1)
    fix = f'did you mean "{near[0]}"?' if near else "known: " + ", ".join(_LORA_KEYS)
    return Problem(f'"{key}" is not known', "network_args", fix)


def _rank(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None
    if value < 1:
        raise ValueError("must be 1 or more")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def _alpha(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise ValueError("must be 0 (which means: equal to conv_dim) or more")
    return value


def _probability(text: str) -> float:
    if text.lower() in ("", "none"):
        return 0.0
    value = _number(text)
    if not 0 <= value < 1:
        raise ValueError("must be 0 or more and below 1")
    return value


_LORA_KEYS: dict[str, Callable[[str], int | float]] = {
    "conv_dim": _rank,
    "conv_alpha": _alpha,
    "dropout": _probability,
    "rank_dropout": _probability,
    "module_dropout": _probability,
}
