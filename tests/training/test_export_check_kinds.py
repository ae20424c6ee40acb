"""The check of a saved network for every kind: sound files pass in every precision, damaged ones are caught."""

import types

import pytest
import torch

from library.errors import UserError
from library.inference.adapters import adapter_roots
from library.io.safetensors_file import save
from library.models import checkpoint
from library.training.export_check import ExportCheck
from tests.networks.test_contract import WIDE, create, trained

KINDS = sorted(set(WIDE) - {"lora"})  # that one has tests of its own
MODULE = "unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "unet_input_blocks_1_0_in_layers_2"
FEW = (MODULE, CONVOLUTION, MODULE.replace("to_q", "to_k"), "te2_text_model_encoder_layers_0_mlp_fc1")


@pytest.fixture(scope="module")
def bundle():
    return checkpoint.load_bundle("tiny")


@pytest.fixture(scope="module", params=KINDS)
def trainable(request, bundle):
    """A kind's network of a few modules with weights, attached and in training as in a run."""
    module, network = create(request.param, adapter_roots(bundle))
    few = {key: value for key, value in trained(network).export()[0].items() if key.partition(".")[0].endswith(FEW)}
    network = module.create_from_weights(adapter_roots(bundle), few, args={})
    network.attach().train()
    yield types.SimpleNamespace(
        network=network,
        read_saved=lambda bundle, tensors, where: module.create_from_weights(
            adapter_roots(bundle), tensors, where=where
        ),
    )
    network.detach()


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_a_sound_file_passes(trainable, bundle, tmp_path, dtype):
    save(trainable.network.export(dtype=dtype)[0], tmp_path / "net.safetensors")
    autocast = (lambda: torch.autocast("cpu", dtype)) if dtype else (lambda: torch.autocast("cpu", enabled=False))
    check = ExportCheck(trainable, bundle, with_text=True, autocast=autocast)
    check(tmp_path / "net.safetensors", is_last=True)
    assert (tmp_path / "net.safetensors").exists()


def test_damage_is_caught_in_each_tensor_of_a_module(trainable, bundle, tmp_path):
    check = ExportCheck(trainable, bundle, with_text=False, _has_run=True)
    whole = trainable.network.export(dtype=torch.float16)[0]
    damaged = []
    for key, value in whole.items():
        name, _, tail = key.partition(".")
        if not name.endswith((MODULE, CONVOLUTION)):
            continue
        damaged.append((f"{key} x 1.02", whole | {key: value * 1.02}))
        if tail != "alpha":
            damaged.append((f"{key} in reverse", whole | {key: value.flip(0 if len(value) > 1 else 1)}))
            damaged.append((f"without {key}", {other: v for other, v in whole.items() if other != key}))
    gone = [key for key in whole if key.partition(".")[0].endswith(MODULE)]
    damaged.append((f"without {MODULE}", {key: value for key, value in whole.items() if key not in gone}))
    assert len(damaged) > 8
    missed = []
    for what, tensors in damaged:
        path = tmp_path / "net.safetensors"
        save(tensors, path)
        try:
            check(path, is_last=False)
            missed.append(what)
        except UserError as error:
            assert "the saved network is not the trained one" in str(error)
            assert path.with_name(path.name + ".differs").exists() and not path.exists()
    assert missed == []
