"""The packed tiny SDXL: what packing may change, and what the shipped file must be able to do."""

import json

import numpy as np
import pytest
import torch

from library.models.tiny.unpack import WEIGHTS, dequantized, generated_table, unpack
from tools.tiny import arch, pack


def small_state(changed_rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A state dict of odd corners: empty rows, tiny and huge values, tables with a few trained rows."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "unet.conv.weight": torch.randn(5, 3, 3, 3, generator=generator) * 1e-3,
        "unet.linear.weight": torch.randn(4, 6, generator=generator) * torch.tensor([0.0, 1e-4, 1.0, 100.0])[:, None],
        "vae.norm.bias": torch.randn(7, generator=generator),
    }
    for part, width in (("te1", 32), ("te2", 48)):
        table = torch.from_numpy(arch.token_table(part, width)).float()
        table[list(changed_rows)] += 1
        state[f"{part}.{arch.TABLE_KEYS[part]}"] = table
    return state


def test_quantized_rows_stay_within_half_a_step():
    rows = (
        np.random.default_rng(0).normal(size=(64, 3, 5)).astype(np.float32)
        * 10 ** np.linspace(-3, 2, 64)[:, None, None]
    )
    q, scale = pack.quantized(rows)
    error = np.abs(dequantized(q, scale).astype(np.float64) - rows).max(axis=(1, 2))
    step = np.abs(rows).max(axis=(1, 2)) / 127
    assert (error <= 0.52 * step + 1e-3 * np.abs(rows).max(axis=(1, 2))).all()


def test_packing_keeps_names_shapes_vectors_and_trained_token_rows(tmp_path):
    state = small_state((320, 49407))
    pack.pack(state, tmp_path / "w.safetensors", metadata={"tiny.source": "test"})
    full, metadata = unpack(tmp_path / "w.safetensors")
    assert {k: v.shape for k, v in full.items()} == {k: v.shape for k, v in state.items()}
    assert {v.dtype for v in full.values()} == {torch.float16}
    assert torch.equal(full["vae.norm.bias"], state["vae.norm.bias"].half())
    for part in ("te1", "te2"):
        name = f"{part}.{arch.TABLE_KEYS[part]}"
        assert torch.equal(full[name], state[name].half())
    assert (
        metadata["tiny.source"] == "test" and metadata["tiny.norm_groups"] == "8" and metadata["tiny.head_dim"] == "16"
    )


def test_only_trained_token_rows_are_stored(tmp_path):
    from safetensors.numpy import load_file

    pack.pack(small_state((5, 7, 11)), tmp_path / "w.safetensors", metadata={})
    packed = load_file(tmp_path / "w.safetensors")
    for part, width in (("te1", 32), ("te2", 48)):
        assert packed[f"{part}.token_rows.ids"].tolist() == [5, 7, 11]
        assert packed[f"{part}.token_rows.values"].shape == (3, width)


def test_generated_table_never_changes():
    """Values written down once: another stream would silently change every untrained word."""
    first = generated_table(101, 49408, 32, 0.3)
    assert first[0, :3].tolist() == [0.81201171875, 0.1884765625, 0.2724609375]
    assert first.shape == (49408, 32) and abs(float(first.astype(np.float32).std()) - 0.3) < 1e-3


@pytest.fixture(scope="module")
def shipped():
    return unpack(WEIGHTS)


def test_shipped_file_is_small_and_says_what_it_is(shipped):
    metadata = shipped[1]
    assert WEIGHTS.stat().st_size <= 14_000_000
    assert json.loads(metadata["tiny.configs"]) == json.loads(json.dumps(arch.CONFIGS))
    assert json.loads(metadata["tiny.score"])["drawn_pairs"]["all"] >= 0.85


def test_shipped_model_draws_what_it_is_told(shipped):
    models = pack.models_of(shipped[0])  # loads strictly: every key and shape fits the four architectures
    result = pack.score_models(models, 16, seed=3)
    assert result["all"] >= 0.8 and result["colour"] >= 0.93 and result["background"] >= 0.93


def test_tokenizer_gives_clips_ids():
    tokenizer = arch.load_tokenizer()
    assert tokenizer("a red circle")["input_ids"] == [49406, 320, 736, 7117, 49407]
    first, second = arch.tokenize(tokenizer, ["a red circle"])
    assert first[0, 4:].tolist() == [49407] * 73 and second[0, 4:].tolist() == [49407] + [0] * 72
