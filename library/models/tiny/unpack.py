"""Read the packed weights of the embedded tiny SDXL: int8 rows and a few token rows become a full state dict.

Packed names: `X.q` int8 and `X.s` float16 (one scale per output row) stand for a weight X of two or more
dimensions; other tensors are float16 as they are. Of each token table only the trained rows are stored
(`te1.token_rows.ids` int32 (R,), `te1.token_rows.values` float16 (R, d), `te2...` likewise); all other rows
are generated from the seed that the header's `tiny.token_tables` names. Made by tools/make_tiny_sdxl.py.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

WEIGHTS = Path(__file__).with_name("weights.safetensors")


def unpack(path: Path | str = WEIGHTS) -> tuple[dict[str, "torch.Tensor"], dict[str, str]]:
    """The whole model as float16 tensors, and the file's metadata.

    Names are those of diffusers and transformers with `unet.`, `te1.`, `te2.` or `vae.` in front (`te1`
    without, `te2` with `text_model.`, as transformers 5 has them). Both token tables have all 49408 rows.
    """
    import torch
    from safetensors import safe_open

    with safe_open(str(path), "np") as file:
        metadata = dict(file.metadata())
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    full = {}
    for name, value in packed.items():
        if name.endswith(".q"):
            full[name[:-2]] = dequantized(value, packed[name[:-2] + ".s"])
        elif not name.endswith(".s") and ".token_rows." not in name:
            full[name] = value
    for encoder, table in json.loads(metadata["tiny.token_tables"]).items():
        rows = packed[f"{encoder}.token_rows.values"]
        generated = generated_table(table["seed"], table["num_rows"], rows.shape[1], table["std"])
        generated[packed[f"{encoder}.token_rows.ids"]] = rows
        full[table["name"]] = generated
    return {name: torch.from_numpy(value) for name, value in sorted(full.items())}, metadata


def dequantized(q: "np.ndarray", scale: "np.ndarray") -> "np.ndarray":
    """int8 (rows, ...) times float16 (rows,) -> float16 (rows, ...)."""
    import numpy as np

    shape = (len(scale),) + (1,) * (q.ndim - 1)
    return (q.astype(np.float32) * scale.astype(np.float32).reshape(shape)).astype(np.float16)


def generated_table(seed: int, num_rows: int, width: int, std: float) -> "np.ndarray":
    """The token table before training, float16 (num_rows, width); NumPy guarantees this legacy stream."""
    import numpy as np

    return (np.random.RandomState(seed).standard_normal((num_rows, width)) * std).astype(np.float16)
