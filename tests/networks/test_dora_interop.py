"""DoRA files between this suite, diffusers, PEFT and LyCORIS: every reader predicts what the writer did, to 1e-4."""

import copy

import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.kohya_view import text_encoder_view, unet_view
from networks import _foreign, dora
from tests.networks.parts import predict, unet_inputs
from tests.networks.test_contract import trained
from tools.convert_lora import main

kohya = pytest.importorskip("lycoris.kohya")
PARTS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture
def own(tiny_unet, tiny_text_encoders):
    """Our models; what is attached to them is taken off again."""
    return tiny_unet, *tiny_text_encoders


@pytest.fixture
def models(own):
    """Copies of U-Net and text encoders for another program to change."""
    return [copy.deepcopy(model).requires_grad_(False) for model in own]


def outputs(unet, *encoders):
    """The prediction and what both text encoders give to it."""
    ids = torch.randint(0, 900, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 999
    with torch.no_grad():
        hidden = [te(ids, output_hidden_states=True).hidden_states[-2] for te in encoders]
    return [predict(unet, unet_inputs()), *hidden]


def of_network(network, models):
    network.eval().attach()
    try:
        return outputs(*models)
    finally:
        network.detach()


def assert_same(one, other, base):
    for a, b, plain in zip(one, other, base, strict=True):
        assert (a - plain).abs().max() > 0.01
        assert (a - b).abs().max() <= 1e-4


@pytest.fixture
def ours(tiny_roots, own, tmp_path):
    """ours(**args): a trained DoRA's file, and what the models give with and without it."""

    def make(**args):
        g = torch.Generator().manual_seed(4)
        network = dora.create(tiny_roots, dim=4, alpha=2.0, args={"conv_dim": "2", **args}, generator=g)
        path = tmp_path / "ours.safetensors"
        save_file(trained(network).export()[0], path)
        return path, of_network(network, own), outputs(*own)

    return make


def pipeline(models):
    unet, te1, te2 = models
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=te1, text_encoder_2=te2, tokenizer=None, tokenizer_2=None, unet=unet, scheduler=None
    )


def converted(source, target, to):
    assert main([f"--model={source}", f"--save_to={target}", f"--to={to}"]) == 0
    return target


@pytest.mark.parametrize("reader", ["diffusers", "peft"])
def test_others_predict_with_our_dora_as_we_do(ours, models, tmp_path, reader):
    path, wanted, base = ours()
    if reader == "diffusers":
        converted(path, tmp_path / "theirs.safetensors", "diffusers")
        pipeline(models).load_lora_weights(str(tmp_path), weight_name="theirs.safetensors")
    else:
        folder = converted(path, tmp_path / "theirs", "peft")
        wrapped = [peft.PeftModel.from_pretrained(m, folder / n) for m, n in zip(models, PARTS, strict=True)]
        models = [each.base_model.model for each in wrapped]
    assert_same(outputs(*models), wanted, base)


@pytest.mark.parametrize("writer", ["diffusers", "peft"])
def test_we_predict_with_their_dora_as_they_do(tiny_roots, own, models, tmp_path, capsys, writer):
    linears = ["to_q", "to_v", "to_out.0", "ff.net.2", "conv1", "conv_shortcut"]
    targets = [linears, ["q_proj", "out_proj", "fc1"], ["k_proj", "fc2"]]
    wrapped, generator = [], torch.Generator().manual_seed(8)
    for model, names in zip(models, targets, strict=True):
        config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=names)
        wrapped.append(peft.get_peft_model(model, config).eval())
        for name, parameter in wrapped[-1].named_parameters():
            if "lora_B" in name or "magnitude" in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.data += noise if "lora_B" in name else noise * parameter
    wanted = outputs(*(each.base_model.model for each in wrapped))
    if writer == "peft":
        source = tmp_path / "theirs"
        for name, each in zip(PARTS, wrapped, strict=True):
            each.save_pretrained(source / name)
    else:
        written = {}
        for name, each in zip(PARTS, wrapped, strict=True):
            tensors = peft.get_peft_model_state_dict(each).items()
            written[f"{name}_lora_layers"] = {key.removeprefix("base_model.model."): value for key, value in tensors}
            written[f"{name}_lora_adapter_metadata"] = each.peft_config["default"].to_dict()
        pipeline(models).save_lora_weights(tmp_path, **written)
        source = tmp_path / "pytorch_lora_weights.safetensors"
    path = converted(source, tmp_path / "back.safetensors", "sd-scripts")
    assert "note: the file says nothing about alpha" not in capsys.readouterr().out
    network = dora.create_from_weights(tiny_roots, load_file(path))
    assert len(network.adapters) > 60 and network.count("te2")
    assert_same(of_network(network, own), wanted, outputs(*own))


def host_on(models):
    unet, *encoders = models
    return _foreign.Host([text_encoder_view(te) for te in encoders], unet_view(unet), None)


def test_lycoris_predicts_with_our_dora_as_we_do(ours, models):
    path, wanted, base = ours()
    network = _foreign.create_from_weights(kohya, host_on(models), str(path), for_inference=True)
    network.attach()
    assert_same(outputs(*models), wanted, base)


@pytest.mark.parametrize("on_output", ["True", "False"])
def test_we_predict_with_lycoris_dora_as_it_does(tiny_roots, own, models, tmp_path, on_output):
    torch.manual_seed(3)
    args = {"dora_wd": "True", "wd_on_output": on_output, "preset": "attn-mlp", "warn_on_unmatched": ""}
    network = _foreign.create(kohya, host_on(models), dim=4, alpha=2.0, dropout=None, args=args)
    network.apply(text_encoders=True, unet=True)
    for unit in network.units:
        torch.nn.init.normal_(unit.lora_up.weight, std=0.05)
        with torch.no_grad():
            unit.dora_scale.mul_(torch.rand_like(unit.dora_scale) * 0.2 + 0.9)
    network.network.save_weights(str(tmp_path / "theirs.safetensors"), None, {})
    read = dora.create_from_weights(tiny_roots, load_file(tmp_path / "theirs.safetensors"))
    assert {adapter.on_output for adapter in read.adapters.values()} == {on_output == "True"}
    assert len(read.adapters) == len(network.units)
    assert_same(of_network(read, own), outputs(*models), outputs(*own))


def test_what_lycoris_cannot_read_is_refused_with_the_way_out(ours, models):
    path, _, _ = ours(wd_on_output="False")
    with pytest.raises(UserError, match="wd_on_output") as error:
        _foreign.create_from_weights(kohya, host_on(models), str(path))
    assert "networks.dora" in error.value.problems[0].fix
    tensors = load_file(path)
    save_file({key.replace("lora_up.weight", "hada_w1_a"): value for key, value in tensors.items()}, path)
    with pytest.raises(UserError, match="wd_on_output") as error:
        _foreign.create_from_weights(kohya, host_on(models), str(path))
    assert "network_weights" in error.value.problems[0].fix
