"""The machine that numbers were measured on, named by its class."""

from __future__ import annotations

import os
import platform


def machine_class(*, with_gpu: bool = True) -> str:
    """Such as "2 CPU cores, x86_64, Linux, Python 3.11" or "NVIDIA H200, ..."; torch is asked only for a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    python = ".".join(platform.python_version_tuple()[:2])
    words = [f"{cores} CPU core{'s' if cores > 1 else ''}", platform.machine(), platform.system(), f"Python {python}"]
    if with_gpu:
        import torch

        words.append(f"torch {torch.__version__.split('+')[0]}")
        if torch.cuda.is_available():
            words.insert(0, torch.cuda.get_device_name())
    return ", ".join(words)
