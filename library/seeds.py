"""Seeds derived from what they are for, so that no generator state has to be carried around or saved."""

from __future__ import annotations

import hashlib
import operator
from typing import SupportsIndex


def derive_seed(*parts: SupportsIndex | str) -> int:
    """A seed in [0, 2**63) from whole numbers and texts, equal on every platform and Python version.

    Usage: `derive_seed(run_seed, "noise", epoch, record_key, repeat)`. The order of the parts matters, 1 and "1" are
    different parts, and parts never run together ("ab", "c" is not "a", "bc"). Raises TypeError on floats.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        tag, text = (b"s", part) if isinstance(part, str) else (b"i", str(operator.index(part)))
        data = text.encode("utf-8", "surrogatepass")
        digest.update(tag + len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1
