"""A saved network must do what the live one does: faithful files pass in every precision, others are set aside."""

import types

import pytest
import torch

from library.errors import UserError
from library.inference.adapters import adapter_roots
from library.io.safetensors_file import save
from library.models import checkpoint
from library.training import export_check
from library.training.export_check import ExportCheck
from networks import lora

MODULE = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te2_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture(scope="module")
def bundle():
    return checkpoint.load_bundle("tiny")


@pytest.fixture
def trainable(bundle):
    """A network with weights, attached and in training as in a run; dropout would show if a mode were wrong."""
    generator = torch.Generator().manual_seed(1)
    args = {"conv_dim": "2", "dropout": "0.5"}
    network = lora.create(adapter_roots(bundle), dim=4, alpha=2.0, args=args, generator=generator)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if "lora_up" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    network.attach().train()
    yield types.SimpleNamespace(
        network=network,
        read_saved=lambda bundle, tensors, where: lora.create_from_weights(adapter_roots(bundle), tensors, where=where),
    )
    network.detach()


@pytest.fixture
def check(trainable, bundle):
    return ExportCheck(trainable, bundle, with_text=True)


def write(trainable, path, *, dtype=None, change=None):
    tensors, _ = trainable.network.export(dtype=dtype)
    if change:
        change(tensors)
    save(tensors, path)
    return path


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_a_faithful_file_passes_and_nothing_has_changed(trainable, check, bundle, tmp_path, dtype):
    path = write(trainable, tmp_path / "net.safetensors", dtype=dtype)
    network = trainable.network
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in network.state_dict().items()}
    modes = [module.training for module in (*network.modules(), *bundle.unet.modules())]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check(path, is_last=True)
    assert torch.equal(torch.rand(2), expected)
    assert path.exists() and network.multiplier == 1.0
    assert modes == [module.training for module in (*network.modules(), *bundle.unet.modules())]
    for name, tensor in network.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1]), name
    assert all(tensor.grad is None for tensor in network.parameters())
    assert not any(len(m.__dict__["adapter_patch"].adapters) > 1 for m in bundle.unet.modules() if "forward" in vars(m))


def wrong_alpha(tensors):
    tensors[MODULE + ".alpha"] *= 1.01


def swapped(tensors):
    other = MODULE.replace("to_q", "to_k")
    for tail in ("lora_up.weight", "lora_down.weight"):
        tensors[f"{MODULE}.{tail}"], tensors[f"{other}.{tail}"] = (
            tensors[f"{other}.{tail}"],
            tensors[f"{MODULE}.{tail}"],
        )


def wrong_sign(tensors):
    tensors[TEXT + ".lora_up.weight"].neg_()


def module_is_missing(tensors):
    for tail in ("lora_up.weight", "lora_down.weight", "alpha"):
        del tensors[f"{TEXT}.{tail}"]


def not_a_number(tensors):
    tensors[MODULE + ".lora_up.weight"][0, 0] = float("nan")


@pytest.mark.parametrize("change", [wrong_alpha, swapped, wrong_sign, module_is_missing, not_a_number])
@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_differs_is_an_error_and_set_aside(trainable, check, tmp_path, change, first):
    check._has_run = not first
    path = write(trainable, tmp_path / "net.safetensors", dtype=torch.float16, change=change)
    with pytest.raises(UserError, match="the saved network is not the trained one") as caught:
        check(path, is_last=False)
    assert "lora_" in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["net.safetensors.differs"]


@pytest.mark.parametrize(("name", "where"), [(MODULE, "the prediction"), (TEXT, "the text encoders' output")])
def test_the_first_and_the_last_save_compare_the_model_s_output(trainable, check, tmp_path, name, where):
    """An adapter that does not act in the live model answers a probe all the same."""
    trainable.network.adapters[name].enabled = False
    check._has_run = True
    check(write(trainable, tmp_path / "middle.safetensors"), is_last=False)
    for is_first in (True, False):
        check._has_run = not is_first
        with pytest.raises(UserError, match=where):
            check(write(trainable, tmp_path / "net.safetensors"), is_last=not is_first)


def test_cached_text_leaves_the_text_encoders_alone(trainable, bundle, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the text encoders are not on the device")

    monkeypatch.setattr(export_check.sdxl, "encode_text", refuse)
    ExportCheck(trainable, bundle, with_text=False)(write(trainable, tmp_path / "n.safetensors"), is_last=True)


def test_half_precision_and_autocast_pass(bundle, trainable, tmp_path):
    trainable.network.to(torch.bfloat16)
    path = write(trainable, tmp_path / "net.safetensors")
    ExportCheck(trainable, bundle, with_text=True, autocast=lambda: torch.autocast("cpu", torch.bfloat16))(
        path, is_last=True
    )


def test_a_network_that_has_learned_nothing_passes(trainable, check, tmp_path):
    with torch.no_grad():
        for name, tensor in trainable.network.named_parameters():
            if "lora_up" in name:
                tensor.zero_()
    check(write(trainable, tmp_path / "net.safetensors", dtype=torch.float16), is_last=True)
