"""network_args target_rules: rank, alpha and rate for the modules whose name a regular expression finds; torch-free.

`target_rules=attn1_to_[qk] -> dim=8 alpha=4 lr=1e-4; ff_net -> off`: rules are parted by ";", the first that finds
something in a module's name (as the file has it, lora_unet_… or lora_te1_…) decides. A module that no rule finds is
adapted as without rules.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

ARROW = "->"


@dataclass(frozen=True)
class TargetRule:
    """What one rule says. dim 0: not adapted; None: as without the rule. lr is absolute; 0 keeps the modules frozen."""

    pattern: re.Pattern[str]
    dim: int | None = None
    alpha: float | None = None
    lr: float | None = None


def parse_rules(text: str) -> tuple[TargetRule, ...]:
    """The rules of a text; raises ValueError that shows the rule which is wrong."""
    rules = tuple(_parse_rule(part.strip()) for part in text.split(";") if part.strip())
    if not rules:
        raise ValueError(f'holds no rule; write "expression {ARROW} dim=8"')
    return rules


def find_rule(rules: Sequence[TargetRule], name: str) -> int | None:
    """The index of the first rule that finds something in a module's name."""
    return next((index for index, rule in enumerate(rules) if rule.pattern.search(name)), None)


def _parse_rule(text: str) -> TargetRule:
    expression, arrow, settings = (part.strip() for part in text.partition(ARROW))
    if not arrow or not expression or not settings:
        raise ValueError(f'"{text}" is not "expression {ARROW} dim=8 alpha=4 lr=1e-4" or "expression {ARROW} off"')
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ValueError(f'"{expression}" is not a regular expression ({error})') from None
    if settings == "off":
        return TargetRule(pattern, dim=0)
    values: dict[str, float] = {}
    for item in settings.split():
        key, _, value = item.partition("=")
        if key not in ("dim", "alpha", "lr") or key in values:
            raise ValueError(f'"{item}" in "{text}" is none of dim=, alpha=, lr=, each at most once')
        values[key] = _value(key, value)
    return TargetRule(pattern, **values)  # type: ignore[arg-type]


def _value(key: str, text: str) -> float:
    try:
        value = int(text) if key == "dim" else float(text)
    except ValueError:
        raise ValueError(f"{key}={text} is not a {'whole ' if key == 'dim' else ''}number") from None
    if not 0 <= value < math.inf:
        raise ValueError(f"{key}={text} must not be negative")
    return value
