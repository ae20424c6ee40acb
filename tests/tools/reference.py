"""What LoRA files mean, written with numpy from the format's description, apart from the tools' own code."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def modules_of(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Module name -> {"up", "down", "alpha"}; up and down as float64 matrices, down's kernel flattened."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in load_file(path).items():
        name, _, tail = key.partition(".")
        tail = {"lora_up.weight": "up", "lora_down.weight": "down", "alpha": "alpha"}[tail]
        value = value.astype(np.float64)
        found.setdefault(name, {})[tail] = value if tail == "alpha" else value.reshape(len(value), -1)
    return found


def delta_of(module: dict[str, np.ndarray]) -> np.ndarray:
    """alpha / rank * up @ down, float64, a matrix."""
    rank = len(module["down"])
    return float(module.get("alpha", rank)) / rank * module["up"] @ module["down"]


def deltas_of(path: Path) -> dict[str, np.ndarray]:
    """Change of every module of a file."""
    return {name: delta_of(module) for name, module in modules_of(path).items()}


def places(keys) -> dict[str, tuple[str, slice | None]]:
    """LoRA module name -> (key of a single file, rows of it; None for all), from lora_format.md and model_files.md."""
    found: dict[str, tuple[str, slice | None]] = {}
    prefixes = {"model.diffusion_model.": "lora_unet_", "conditioner.embedders.0.transformer.": "lora_te1_"}
    for key in keys:
        for prefix, ours in prefixes.items():
            if key.startswith(prefix) and key.endswith(".weight"):
                found[ours + key[len(prefix) : -len(".weight")].replace(".", "_")] = (key, None)
        start = "conditioner.embedders.1.model.transformer.resblocks."
        if key.startswith(start):
            layer, _, rest = key[len(start) :].partition(".")
            name = f"lora_te2_text_model_encoder_layers_{layer}_"
            inner = {"attn.out_proj": "self_attn_out_proj", "mlp.c_fc": "mlp_fc1", "mlp.c_proj": "mlp_fc2"}
            if rest.endswith(".weight") and rest[: -len(".weight")] in inner:
                found[name + inner[rest[: -len(".weight")]]] = (key, None)
            if rest == "attn.in_proj_weight":
                for index, part in enumerate("qkv"):
                    found[f"{name}self_attn_{part}_proj"] = (key, index)
    return found


def merged(base: Path, changes: list[tuple[Path, float, dict]]) -> dict[str, np.ndarray]:
    """The base file's tensors with the sum of ratio * weight * delta; changes: (file, ratio, {name: weight or 1})."""
    tensors = {key: value.astype(np.float64) for key, value in load_file(base).items()}
    table = places(tensors)
    for path, ratio, weights in changes:
        for name, delta in deltas_of(path).items():
            key, third = table[name]
            rows = slice(None)
            if third is not None:
                height = len(tensors[key]) // 3
                rows = slice(third * height, (third + 1) * height)
            part = tensors[key][rows]
            part += ratio * weights.get(name, 1.0) * delta.reshape(part.shape)
    return tensors


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))
