"""Files of the training's work folder: written beside their place, then moved there."""

import os
import time
from pathlib import Path
from typing import Any


def save_file(value: Any, path: Path) -> None:
    """torch.save that a kill cannot leave half written."""
    import torch

    beside = path.with_suffix(path.suffix + ".part")
    torch.save(value, beside)
    os.replace(beside, path)


def progress(started: float, first: int, step: int, num_steps: int) -> str:
    """Seconds a step and minutes left of a loop that began at `started` (time.monotonic) with step `first`."""
    spent = (time.monotonic() - started) / (step - first + 1)
    return f"{spent:.2f} s/step eta {spent * (num_steps - step - 1) / 60:.1f} min"


def load_file(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)
