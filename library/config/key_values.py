"""Lists of key=value texts, as optimizer_args, lr_scheduler_args and network_args take them."""

from __future__ import annotations

import ast
from collections.abc import Iterable


def split_pairs(items: Iterable[str]) -> dict[str, str]:
    """{"a": "1"} from ["a=1"]; the value may hold further "=" signs. Raises ValueError naming the bad item."""
    pairs: dict[str, str] = {}
    for item in items:
        key, sign, value = item.partition("=")
        key = key.strip()
        if not sign or not key:
            raise ValueError(f"holds {item!r}, which is not of the form key=value")
        if key in pairs:
            raise ValueError(f"names {key} twice")
        pairs[key] = value.strip()
    return pairs


def literal_pairs(items: Iterable[str]) -> dict[str, object]:
    """Like `split_pairs`, with each value read as a Python literal: 0.01, True, (0.9, 0.99), "text".

    A bare tuple such as 0.9,0.99 is a literal too. Raises ValueError naming the bad item.
    """
    values: dict[str, object] = {}
    for key, text in split_pairs(items).items():
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(
                f"holds {key}={text}, whose value is not a Python literal; texts need quotes, as in {key}='{text}'"
            ) from None
    return values
