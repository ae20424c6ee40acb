"""Writing the networks that the tools make: metadata, hashes, one checked and atomic file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import torch

from library.inference.lora_tools.files import stem_of, stored
from library.io.hashing import network_hashes
from library.io.modelspec import modelspec_metadata
from library.io.safetensors_file import save
from library.io.spool import Spool
from library.log import get_logger
from networks._algebra import Factors

log = get_logger(__name__)

DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PREDICTIONS: dict[str, Literal["epsilon", "v_prediction", "rectified_flow"]] = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "rectified_flow": "rectified_flow",
}


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype that --precision and --save_precision name; None when nothing is named."""
    return None if name is None else DTYPES[name]


class NetworkWriter:
    """Collects modules on the disk and writes them as one LoRA file; a context manager.

    dtype: what factors are stored in (None: as they come); alphas are float32. Memory holds one module at a time.
    """

    def __init__(self, path: str, dtype: torch.dtype | None) -> None:
        self.path, self.dtype = path, dtype
        self.ranks: dict[str, tuple[int, float]] = {}
        self._spool = Spool(path)

    def __enter__(self) -> NetworkWriter:
        return self

    def __exit__(self, *reason: object) -> None:
        self._spool.__exit__(None, None, None)

    def add(self, name: str, factors: Factors, alpha: float, shape: tuple[int, ...]) -> Factors:
        """Store one module under sd-scripts' keys; returns the factors in float32 as a reader will see them."""
        keys = (f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha")
        return self.add_keys(keys, factors, alpha, shape)

    def add_keys(self, keys: tuple[str, str, str], factors: Factors, alpha: float, shape: tuple[int, ...]) -> Factors:
        """As `add`, with the names of down, up and alpha."""
        up, down = (factor if self.dtype is None else factor.to(self.dtype) for factor in factors)
        down_key, up_key, alpha_key = keys
        self._spool.add(down_key, stored(down, shape, up=False))
        self._spool.add(up_key, stored(up, shape, up=True))
        self._spool.add(alpha_key, torch.tensor(float(alpha)))
        self.ranks[down_key] = (len(down), float(alpha))
        return Factors(up.float(), down.float())

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the file with `metadata`, completed by the hashes of its tensors."""
        model_hash, legacy_hash = network_hashes(self._spool, metadata)
        hashes = {"sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}
        save(self._spool, self.path, {**metadata, **hashes}, checked=True)
        log.info("written: %s (%d modules)", self.path, len(self.ranks))


def minimal_metadata(dim: str, alpha: str, *, args: str | None = None, base: str | None = None) -> dict[str, str]:
    """The ss_* keys that every LoRA file has (model_files.md section 9); args is JSON."""
    found = {
        "ss_v2": "False",
        "ss_base_model_version": base or "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
    }
    return found | ({"ss_network_args": args} if args else {})


def spec_metadata(path: str, *, prediction: str | None = None, **fields: str | None) -> dict[str, str]:
    """modelspec.* of a LoRA that a tool made now; prediction as modelspec spells it."""
    created = datetime.fromtimestamp(time.time())
    kind: Any = _PREDICTIONS.get(prediction or "", "epsilon")
    return modelspec_metadata("lora", created=created, title=stem_of(path), prediction_type=kind, fields=fields)
