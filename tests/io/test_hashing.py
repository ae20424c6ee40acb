"""Hashes against their definition on real bytes; identity of weights whatever their storage."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch

from library.io import hashing


def _by_definition(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    raw = reference.save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    return hashlib.sha256(data).hexdigest(), hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("elements", [10, 0x100000 // 4 - 40, 0x100000 // 4 + 3000, 0x120000 // 4])
def test_network_hashes_equal_those_of_the_written_file(elements: int) -> None:
    """Sizes put the 64 KiB window past the end, across the end, across two tensors, and inside one."""
    generator = torch.Generator().manual_seed(elements)
    tensors = {
        "b": torch.randn(elements, generator=generator),
        "a.alpha": torch.tensor(4.0),
        "c": torch.randn(5, 3, generator=generator).half(),
    }
    metadata = {"ss_steps": "100", "modelspec.title": "x", "sshs_model_hash": "y"}
    assert hashing.network_hashes(tensors, metadata) == _by_definition(tensors, metadata)


def test_a_window_over_many_small_tensors_and_a_long_header_is_right() -> None:
    tensors = {f"layer.{i:04d}.lora_down.weight": torch.full((4, 200), float(i)) for i in range(400)}
    assert hashing.network_hashes(tensors, {"ss_tag_frequency": "x" * 70_000}) == _by_definition(
        tensors, {"ss_tag_frequency": "x" * 70_000}
    )


def test_the_model_hash_ignores_metadata_and_small_files_have_the_empty_legacy_hash() -> None:
    tensors = {"a": torch.ones(3)}
    first, second = hashing.network_hashes(tensors, {}), hashing.network_hashes(tensors, {"ss_a": "b", "other": "c"})
    assert first == second and first[1] == "e3b0c442"


def test_file_hashes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = bytes(range(256)) * 5000
    path.write_bytes(content)
    assert hashing.sha256_file(path) == hashlib.sha256(content).hexdigest()
    assert hashing.legacy_hash(path) == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    for function in (hashing.sha256_file, hashing.legacy_hash):
        assert function(tmp_path) == "IsADirectory" and function(tmp_path / "none") == "NOFILE"


WEIGHTS = {"conv": torch.randn(8, 6, 3, 3).half(), "bias": torch.randn(8).half(), "scalar": torch.tensor(2.0).half()}
IDENTITY = hashing.tensors_identity(WEIGHTS)


@pytest.mark.parametrize(
    "same",
    [
        {name: tensor.float() for name, tensor in WEIGHTS.items()},
        dict(reversed(WEIGHTS.items())),
        WEIGHTS | {"conv": WEIGHTS["conv"].to(memory_format=torch.channels_last)},
        {name: torch.nn.Parameter(tensor) for name, tensor in WEIGHTS.items()},
    ],
    ids=["widened", "reordered", "channels last", "parameters"],
)
def test_identity_does_not_depend_on_storage(same: dict[str, torch.Tensor]) -> None:
    assert hashing.tensors_identity(same) == hashing.tensors_identity(same.items()) == IDENTITY
    assert len(IDENTITY) == 16 and int(IDENTITY, 16) >= 0


@pytest.mark.parametrize(
    "other",
    [
        {"conv": WEIGHTS["conv"] * 1.01},
        {"conv": WEIGHTS["conv"].transpose(0, 1).contiguous().transpose(0, 1).flip(0)},
        {"conv": WEIGHTS["conv"].reshape(6, 8, 3, 3)},
        {"bias": WEIGHTS["bias"].roll(1)},
        {"extra": torch.zeros(1)},
    ],
    ids=["scaled", "flipped", "reshaped", "rolled", "more"],
)
def test_identity_tells_weights_apart(other: dict[str, torch.Tensor]) -> None:
    assert hashing.tensors_identity(WEIGHTS | other) != IDENTITY


def test_identity_notices_the_last_element_and_a_rename() -> None:
    big = torch.zeros(100_003)
    changed = big.clone()
    changed[-1] = 1
    assert hashing.tensors_identity({"a": big}) != hashing.tensors_identity({"a": changed})
    assert hashing.tensors_identity({"a": big}) != hashing.tensors_identity({"b": big})


def test_identity_is_stable_between_versions_of_this_program() -> None:
    """Caches store it: another number here means that every user's caches are rebuilt."""
    weights = {"a": torch.arange(1000.0).reshape(10, 100), "b": torch.ones(3, dtype=torch.bfloat16)}
    assert hashing.tensors_identity(weights) == "49b1c7cc2d1fc821"


def test_weights_without_values_have_no_identity() -> None:
    with pytest.raises(ValueError, match="w has no values"):
        hashing.tensors_identity({"w": torch.empty(3, device="meta")})
