"""Progress bars that appear on the first process only, and only when the work takes a while."""

from __future__ import annotations

import os

from tqdm import tqdm

from library.log import Console


def progress_bar(total: int, *, title: str, unit: str = "image", delay: float = 0.0) -> tqdm:
    """A bar of `total` units with rate and remaining time; hidden for `delay` seconds, and on ranks above 0."""
    quiet = os.environ.get("RANK", "0") != "0"
    return tqdm(total=total, desc=title, unit=f" {unit}", delay=delay, disable=quiet, smoothing=0.1, file=Console())
