"""A tiny checkpoint and two LoRAs for it, as files; written once, never changed by a test."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.inference.adapters import adapter_roots
from library.models.checkpoint import load_bundle, save_single_file
from networks import lora


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lora_tools")


@pytest.fixture(scope="session")
def tiny():
    return load_bundle("tiny")


@pytest.fixture(scope="session")
def base(folder, tiny) -> Path:
    path = folder / "base.safetensors"
    save_single_file(tiny, path)
    return path


def write_lora(path: Path, bundle, *, dim: int, conv_dim: int | None, alpha: float, seed: int) -> Path:
    """A LoRA with random factors for the bundle, metadata as a training leaves it."""
    args = {} if conv_dim is None else {"conv_dim": str(conv_dim), "conv_alpha": "3"}
    g = torch.Generator().manual_seed(seed)
    network = lora.create(adapter_roots(bundle), dim=dim, alpha=alpha, args=args, generator=g)
    with torch.no_grad():
        for adapter in network.adapters.values():
            adapter.lora_up.weight.copy_(torch.randn(adapter.lora_up.weight.shape, generator=g) * 0.1)
    tensors, facts = network.export()
    save_file(tensors, path, {**facts, "ss_training_comment": "made for a test", "sshs_model_hash": "old"})
    return path


@pytest.fixture(scope="session")
def first(folder, tiny) -> Path:
    """Linear layers and convolutions: rank 4 and 2, alpha 2 and 3."""
    return write_lora(folder / "first.safetensors", tiny, dim=4, conv_dim=2, alpha=2.0, seed=1)


@pytest.fixture(scope="session")
def second(folder, tiny) -> Path:
    """Linear layers only: rank 3, alpha 1."""
    return write_lora(folder / "second.safetensors", tiny, dim=3, conv_dim=None, alpha=1.0, seed=2)


@pytest.fixture(scope="session")
def few(folder, first) -> Path:
    """The modules of `first` in a few blocks, of every kind."""
    kept = ("middle_block_1_proj", "middle_block_1_transformer_blocks_0_attn1", "input_blocks_3_0_op", "layers_0_")
    kept += ("output_blocks_2_0_", "output_blocks_2_2_conv")
    tensors = {key: value for key, value in load_file(first).items() if any(piece in key for piece in kept)}
    save_file(tensors, folder / "few.safetensors", {"ss_network_module": "networks.lora"})
    return folder / "few.safetensors"


@pytest.fixture
def changed(tmp_path):
    """Write a changed copy of a file: changed(path, {key: tensor or None}) -> the copy; None removes a key."""

    def write(path: Path, changes: dict, name: str = "changed") -> Path:
        tensors = load_file(path)
        for key, value in changes.items():
            tensors.pop(key, None)
            if value is not None:
                tensors[key] = value
        target = tmp_path / f"{name}.safetensors"
        save_file(tensors, target)
        return target

    return write
