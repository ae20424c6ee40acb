"""Pack trained weights into the small file that ships, and score that file as it ships."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from library.models.tiny.unpack import generated_table, unpack
from tools.tiny import arch, scorer, world
from tools.tiny.files import load_file
from tools.tiny.sample import Models, sample

FORMAT_VERSION = "1"
FRESH_SEED = 2026  # of the prompts of the score; training looks at those of seed 1
NUM_STEPS, SCALE = 12, 4.0


def token_tables() -> dict[str, dict]:
    """Where the two token tables come from, as written into the header."""
    return {
        part: {
            "name": f"{part}.{arch.TABLE_KEYS[part]}",
            "seed": seed,
            "num_rows": arch.VOCAB_SIZE,
            "std": arch.TABLE_STD,
        }
        for part, seed in arch.TABLE_SEEDS.items()
    }


def quantized(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (rows, ...) and float16 (rows,) so that their product is near `value`."""
    rows = value.reshape(len(value), -1).astype(np.float32)
    scale = (np.abs(rows).max(axis=1) / 127).astype(np.float16)
    # A scale that float16 rounds down would push the largest weights over 127.
    low = scale.astype(np.float32) * 127 < np.abs(rows).max(axis=1)
    scale[low] = np.nextafter(scale[low], np.float16(np.inf))
    q = np.round(rows / np.maximum(scale.astype(np.float32), 1e-12)[:, None])
    return np.clip(q, -127, 127).astype(np.int8).reshape(value.shape), scale


def pack(state: dict[str, torch.Tensor], path: Path, *, metadata: dict[str, str]) -> None:
    """Write a full state dict (names as `unpack` returns them) in the packed form."""
    from safetensors.numpy import save_file as save_safetensors

    tables, packed = token_tables(), {}
    names = {table["name"] for table in tables.values()}
    for name, tensor in state.items():
        value = tensor.detach().float().numpy()
        if name in names:
            continue
        if value.ndim >= 2:
            packed[name + ".q"], packed[name + ".s"] = quantized(value)
        else:
            packed[name] = value.astype(np.float16)
    for part, table in tables.items():
        rows = state[table["name"]].detach().to(torch.float16).numpy()
        generated = generated_table(table["seed"], table["num_rows"], rows.shape[1], table["std"])
        ids = np.flatnonzero((rows != generated).any(axis=1))
        packed[f"{part}.token_rows.ids"] = ids.astype(np.int32)
        packed[f"{part}.token_rows.values"] = np.ascontiguousarray(rows[ids])
    facts = {
        "tiny.format": FORMAT_VERSION,
        "tiny.world_version": str(world.WORLD_VERSION),
        "tiny.norm_groups": str(arch.NORM_GROUPS),
        "tiny.head_dim": str(arch.HEAD_DIM),
        "tiny.configs": json.dumps(arch.CONFIGS),
        "tiny.token_tables": json.dumps(tables),
    }
    beside = path.with_suffix(".part")
    save_safetensors({k: np.ascontiguousarray(v) for k, v in packed.items()}, beside, metadata=facts | metadata)
    beside.replace(path)


def trained_state(work: Path) -> dict[str, torch.Tensor]:
    """The trained weights (averages, float32) as a full state dict with all token rows."""
    trained = load_file(work / ("unet.pt" if (work / "unet.pt").exists() else "unet_state.pt"))
    state = {f"vae.{name}": value for name, value in load_file(work / "vae.pt").items()}
    state |= trained["average"]
    token_ids = torch.from_numpy(arch.used_token_ids(arch.load_tokenizer(), world.vocabulary()))
    for part in arch.TABLE_SEEDS:
        name = f"{part}.{arch.TABLE_KEYS[part]}"
        rows = state[name]
        table = arch.token_table(part, rows.shape[1])
        state[name] = torch.from_numpy(table).float().index_copy(0, token_ids, rows)
    return state


def models_of(state: dict[str, torch.Tensor]) -> Models:
    """The four models in float32 holding a full state dict."""
    te1, te2 = arch.build_text_encoders()
    models = Models(arch.build_unet(), te1, te2, arch.build_vae())
    for part in ("unet", "te1", "te2", "vae"):
        own = {name[len(part) + 1 :]: v.float() for name, v in state.items() if name.startswith(part + ".")}
        getattr(models, part).load_state_dict(own)
        getattr(models, part).eval()
    return models


def score_models(
    models: Models, num_prompts: int, *, held_out: bool = False, seed: int = FRESH_SEED
) -> dict[str, float]:
    """Shares of right answers on prompts that training never looked at, 128x128, each 0..1."""
    asked, tokenizer, pictures = scorer.prompts(seed, num_prompts, held_out=held_out), arch.load_tokenizer(), []
    for begin in range(0, num_prompts, 32):
        captions = [answer.caption for answer in asked[begin : begin + 32]]
        pictures.extend(sample(models, tokenizer, captions, num_steps=NUM_STEPS, scale=SCALE, seed=seed + begin))
    return scorer.score(pictures, asked)


def rewrite_metadata(path: Path, extra: dict[str, str]) -> None:
    """Add entries to a packed file's header."""
    from safetensors.numpy import load_file as load_safetensors
    from safetensors.numpy import save_file as save_safetensors

    metadata = unpack(path)[1] | extra
    beside = path.with_suffix(".part")
    save_safetensors(load_safetensors(path), beside, metadata=metadata)
    beside.replace(path)


def pack_trained(work: Path, path: Path, *, num_prompts: int, log: Callable[[str], None]) -> None:
    """Pack the work folder's result; the score in the header is that of the packed weights."""
    state = trained_state(work)
    full = {"drawn_pairs": score_models(models_of(state), num_prompts)}
    log(f"float32 weights: {full}")
    beside = work / path.name
    pack(state, beside, metadata={"tiny.source": "tools/make_tiny_sdxl.py"})
    score_packed(beside, num_prompts=num_prompts, log=log)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(beside.read_bytes())
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def score_packed(path: Path, *, num_prompts: int, log: Callable[[str], None], sheet: Path | None = None) -> None:
    """Score a packed file, write the score into its header, draw a contact sheet if asked."""
    state, _ = unpack(path)
    models = models_of(state)
    result = {
        "drawn_pairs": score_models(models, num_prompts),
        "held_out_pairs": score_models(models, num_prompts // 2, held_out=True),
        "num_prompts": num_prompts,
        "sampler": f"euler, {NUM_STEPS} steps, scale {SCALE}, 128x128",
    }
    log(f"packed weights, {path.stat().st_size} bytes: {result}")
    if sheet is None:
        rewrite_metadata(path, {"tiny.score": json.dumps(result)})
    else:
        from tools.tiny.sheet import caption_sheet

        caption_sheet(models, sheet)


def pack_interim(weights: Path, path: Path) -> None:
    """Pack an existing float16 state dict, to have something to build against before training is done."""
    from safetensors.torch import load_file as load_safetensors

    pack(load_safetensors(weights), path, metadata={"tiny.source": "interim", "tiny.score": "{}"})
