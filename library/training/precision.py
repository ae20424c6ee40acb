"""Which dtype each part of the model has."""

from __future__ import annotations

import torch

DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def weight_dtype(mixed_precision: str) -> torch.dtype:
    """dtype of frozen weights under `--mixed_precision` no, fp16 or bf16."""
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


def save_dtype(save_precision: str | None) -> torch.dtype | None:
    """dtype of saved tensors under `--save_precision` float, fp16 or bf16; None keeps each tensor's own."""
    return None if save_precision is None else DTYPES[save_precision]
