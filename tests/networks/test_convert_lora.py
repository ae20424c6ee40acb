"""LoRA files among sd-scripts', diffusers' and PEFT's names: nothing is lost, and other programs read them alike."""

import json
from argparse import Namespace
from contextlib import ExitStack
from copy import deepcopy
from unittest.mock import MagicMock

import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.keymaps.lora import LoraModule, parse_dotted, parse_underscored
from library.models.lora_files import read_lora
from library.models.lora_tool import open_lora, run
from networks import lora
from networks._keys import default_targets
from tests.networks.parts import FULL_UNET, filled, make_roots, make_text_encoders, make_unet, predict, unet_inputs
from tools.convert_lora import main

TO_Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def network(tiny_roots):
    return filled(lora.create(tiny_roots, dim=4, alpha=1.5, args={"conv_dim": "2", "conv_alpha": "1"}).eval(), size=0.1)


@pytest.fixture(scope="module")
def tensors(network):
    """Our own file, with alphas as sd-scripts leaves them: some integers, one in half precision, one missing."""
    found = network.export()[0]
    names = sorted(name for name in found if name.endswith("attn2_to_v.alpha"))
    found[names[0]] = torch.tensor(1, dtype=torch.int64)
    found[names[1]] = torch.tensor(0.1, dtype=torch.float16)
    del found[names[2]]
    return found


@pytest.fixture
def source(tensors, tmp_path):
    path = tmp_path / "source.safetensors"
    save_file(tensors, path, {"ss_network_dim": "4", "sshs_model_hash": "of the layout", "modelspec.title": "mine"})
    return path


def convert(source, target, to, *flags):
    assert main([f"--model={source}", f"--save_to={target}", f"--to={to}", *flags]) == 0
    return target


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("middle", ["diffusers", "sd-scripts-diffusers", "peft"])
def test_there_and_back_is_tensor_identical(source, tensors, tmp_path, middle, capsys):
    between = convert(source, tmp_path / ("folder" if middle == "peft" else "middle.safetensors"), middle)
    assert "note: alpha stands in the header" in capsys.readouterr().out or middle == "sd-scripts-diffusers"
    back = convert(between, tmp_path / "back.safetensors", "sd-scripts")
    assert_identical(load_file(back), tensors)
    found = header(back)
    assert found["modelspec.title"] == "mine" and found["ss_network_dim"] == "4"
    assert len(found["sshs_model_hash"]) == 64
    assert not any("alphas" in key or "adapter_metadata" in key for key in found)


def test_diffusers_to_sd_scripts_and_back_is_tensor_identical(source, tmp_path):
    first = convert(source, tmp_path / "first.safetensors", "diffusers", "--fold_alpha")
    middle = convert(first, tmp_path / "middle.safetensors", "comfyui")
    again = convert(middle, tmp_path / "again.safetensors", "diffusers")
    assert_identical(load_file(again), load_file(first))


def test_names_of_each_layout(source, tmp_path):
    spelled = {
        "sd-scripts": TO_Q + ".lora_down.weight",
        "sd-scripts-diffusers": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "diffusers": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
    }
    text = {
        "sd-scripts": "lora_te1_text_model_encoder_layers_0_self_attn_out_proj.lora_up.weight",
        "diffusers": "text_encoder.text_model.encoder.layers.0.self_attn.out_proj.lora_B.weight",
    }
    for to, key in spelled.items():
        found = load_file(convert(source, tmp_path / f"{to}.safetensors", to))
        assert key in found
        assert text.get(to, text["sd-scripts"]) in found
        assert any(key.endswith(".alpha") for key in found) == (to != "diffusers")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("lora_te1_encoder_layers_3_mlp_fc1", LoraModule("te1", "text_model.encoder.layers.3.mlp.fc1")),
        ("lora_unet_output_blocks_2_2_conv", LoraModule("unet", "up_blocks.0.upsamplers.0.conv")),
        ("lora_unet_input_blocks_3_0_op", LoraModule("unet", "down_blocks.0.downsamplers.0.conv")),
        ("lora_unet_time_embed_0", LoraModule("unet", "time_embedding.linear_1")),
        ("lora_unet_time_embedding_linear_1", LoraModule("unet", "time_embedding.linear_1")),
        ("lora_unet_label_emb_0_2", LoraModule("unet", "add_embedding.linear_2")),
        ("lora_unet_out_2", LoraModule("unet", "conv_out")),
        ("lora_unet_input_blocks_99_0_op", None),
        ("lora_unet_double_blocks_0", None),
    ],
)
def test_underscores_become_dots(name, module):
    assert parse_underscored(name) == module


def test_old_and_peft_names_are_understood():
    place = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert parse_dotted(f"unet.{place}.processor.to_out_lora") == LoraModule("unet", f"{place}.to_out.0")
    assert parse_dotted(f"base_model.model.{place}.to_k") == LoraModule("unet", f"{place}.to_k")
    old = {f"unet.{place}.processor.to_q_lora.down.weight": torch.ones(2, 8)}
    old |= {f"unet.{place}.processor.to_q_lora.up.weight": torch.ones(8, 2)}
    (module,) = read_lora(old, {}, where="old").modules
    assert module.path == f"{place}.to_q"


def full_size_names():
    with torch.device("meta"):
        roots = make_roots(make_unet(**FULL_UNET), *make_text_encoders(64, 64, layers=(12, 32), heads=(1, 1), vocab=9))
    return [target.name for target in default_targets(roots, with_conv=True)]


def comfyui_names():
    """The names that ComfyUI accepts for SDXL, by its rule (comfy/lora.py): for every weight of the U-Net `lora_unet_`
    and its key with underscores, in Stability's naming and in diffusers', and twelve resp. 32 layers of text."""
    with torch.device("meta"):
        unet = make_unet(**FULL_UNET)
    diffusers = [key.removesuffix(".weight") for key in unet.state_dict() if key.endswith(".weight")]
    from tests.networks.parts import sai_name

    inner = [key for key in diffusers if not key.rpartition(".")[2].startswith(("norm", "conv_norm"))]
    names = {"lora_unet_" + key.replace(".", "_") for key in diffusers}
    names |= {"lora_unet_" + sai_name(key).replace(".", "_") for key in inner}
    for part, count in (("te1", 12), ("te2", 32)):
        for layer in range(count):
            for tail in ("mlp_fc1", "mlp_fc2", *(f"self_attn_{kind}_proj" for kind in ("k", "q", "v", "out"))):
                names.add(f"lora_{part}_text_model_encoder_layers_{layer}_{tail}")
    return names


def test_every_name_at_full_size_is_one_that_comfyui_accepts():
    accepted, names = comfyui_names(), full_size_names()
    assert len(names) == 72 + 192 + 788
    assert set(names) <= accepted
    modules = [parse_underscored(name) for name in names]
    assert [module.named("sd-scripts") for module in modules] == names
    renamed = [module.named("sd-scripts-diffusers") for module in modules]
    assert set(renamed) <= accepted and len(set(renamed)) == len(names)
    assert [parse_underscored(name) for name in renamed] == modules
    assert [parse_dotted(module.named("diffusers")) for module in modules] == modules


@pytest.fixture
def pipe(tiny_unet, tiny_text_encoders):
    unet, te1, te2 = (deepcopy(model) for model in (tiny_unet, *tiny_text_encoders))
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=te1, text_encoder_2=te2, tokenizer=None, tokenizer_2=None, unet=unet, scheduler=None
    )


def outputs(unet, te1, te2):
    ids = torch.randint(0, 900, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 999
    with torch.no_grad():
        hidden = [te(ids, output_hidden_states=True).hidden_states[-2] for te in (te1, te2)]
    return [predict(unet, unet_inputs()), *hidden]


@pytest.fixture
def ours(tensors, tiny_roots, tiny_unet, tiny_text_encoders):
    network = lora.create_from_weights(tiny_roots, tensors).eval().attach()
    found = outputs(tiny_unet, *tiny_text_encoders)
    network.detach()
    return found


def assert_close(theirs, ours, base):
    for their, our, plain in zip(theirs, ours, base, strict=True):
        assert (our - plain).abs().max() > 0.01
        assert (their - our).abs().max() <= 1e-4


@pytest.mark.parametrize("flags", [[], ["--fold_alpha"]])
def test_diffusers_draws_as_we_do(source, tmp_path, pipe, ours, tiny_unet, tiny_text_encoders, flags):
    path = convert(source, tmp_path / "diffusers.safetensors", "diffusers", *flags)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    base = outputs(tiny_unet, *tiny_text_encoders)
    assert_close(outputs(pipe.unet, pipe.text_encoder, pipe.text_encoder_2), ours, base)


def test_peft_predicts_as_we_do(source, tmp_path, pipe, ours, tiny_unet, tiny_text_encoders):
    folder = convert(source, tmp_path / "peft", "peft")
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    wrapped = [peft.PeftModel.from_pretrained(model, folder / name) for name, model in models.items()]
    assert_close(outputs(*(each.base_model.model for each in wrapped)), ours, outputs(tiny_unet, *tiny_text_encoders))


def test_alphas_that_diffusers_wrote_are_in_force(source, tmp_path, pipe, tensors):
    convert(source, tmp_path / "first.safetensors", "diffusers")
    pipe.load_lora_weights(str(tmp_path), weight_name="first.safetensors")
    from peft.utils import get_peft_model_state_dict

    written = {"unet_lora_layers": get_peft_model_state_dict(pipe.unet, adapter_name="default_0")}
    written["unet_lora_adapter_metadata"] = pipe.unet.peft_config["default_0"].to_dict()
    pipe.save_lora_weights(tmp_path / "saved", **written)
    back = convert(tmp_path / "saved" / "pytorch_lora_weights.safetensors", tmp_path / "back.safetensors", "sd-scripts")
    found = load_file(back)
    expected = {name: tensor for name, tensor in tensors.items() if name.startswith("lora_unet_")}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float())


@pytest.fixture
def dora_source(tensors, tiny_roots, tmp_path):
    """The same with DoRA magnitudes on every module: the norms of the rows, by random factors."""
    bases = {target.name: target.module.weight for target in default_targets(tiny_roots, with_conv=True)}
    generator = torch.Generator().manual_seed(5)
    found = dict(tensors)
    for name, weight in bases.items():
        norm = weight.detach().flatten(1).norm(dim=1) * (0.5 + torch.rand(len(weight), generator=generator))
        found[f"{name}.dora_scale"] = norm.reshape(-1, *[1] * (weight.ndim - 1))
    path = tmp_path / "dora.safetensors"
    save_file(found, path)
    return path, found, bases


@pytest.mark.parametrize("middle", ["diffusers", "peft"])
def test_dora_there_and_back_is_tensor_identical(dora_source, tmp_path, middle):
    path, expected, _ = dora_source
    between = convert(path, tmp_path / ("folder" if middle == "peft" else "middle.safetensors"), middle)
    assert_identical(load_file(convert(between, tmp_path / "back.safetensors", "sd-scripts")), expected)


def test_diffusers_computes_the_dora_of_the_file(dora_source, tmp_path, pipe, network):
    """W' = m (W + dW) / |W + dW|, norms over each output's row (Liu et al. 2024, equation 5)."""
    path, tensors, bases = dora_source
    convert(path, tmp_path / "dora-diffusers.safetensors", "diffusers")
    pipe.load_lora_weights(str(tmp_path), weight_name="dora-diffusers.safetensors")
    pipe.fuse_lora()
    fused = {}
    for part, model in (("unet", pipe.unet), ("te1", pipe.text_encoder), ("te2", pipe.text_encoder_2)):
        for name, module in model.named_modules():
            if hasattr(module, "base_layer"):
                fused[part, name] = module.base_layer.weight.detach()
    with ExitStack() as stack:
        modules = list(open_lora(path, stack).modules)
    assert len(fused) == len(modules) == len(bases)
    for module in modules:
        name = module.named("sd-scripts")
        found = fused.get((module.part, module.path))
        found = fused[module.part, module.path.removeprefix("text_model.")] if found is None else found
        down, up = (tensors[f"{name}.lora_{half}.weight"].flatten(1) for half in ("down", "up"))
        alpha = float(tensors.get(f"{name}.alpha", torch.tensor(float(len(down)))))
        moved = bases[name].flatten(1) + (up @ down) * alpha / len(down)
        expected = moved / moved.norm(dim=1, keepdim=True) * tensors[f"{name}.dora_scale"].flatten(1)
        torch.testing.assert_close(found.flatten(1), expected, atol=1e-4, rtol=1e-4)


def test_what_has_no_place_is_said(tensors, tmp_path):
    module = TO_Q
    loha = {f"{module}.hada_w1_a": torch.ones(4, 4), f"{module}.alpha": torch.tensor(1.0)}
    with pytest.raises(UserError, match="hada_w1_a has no place in diffusers"):
        _ = run_in_memory(loha, tmp_path, "diffusers")
    renamed = run_in_memory(loha, tmp_path, "sd-scripts-diffusers")
    assert any(key.endswith("attn1_to_q.hada_w1_a") and "down_blocks" in key for key in renamed)
    one = {f"{module}.{tail}": tensors[f"{module}.{tail}"] for tail in ("lora_down.weight", "lora_up.weight", "alpha")}
    inputs = one | {f"{module}.dora_scale": torch.ones(1, one[f"{module}.lora_down.weight"].shape[1])}
    if inputs[f"{module}.dora_scale"].shape[1] == one[f"{module}.lora_up.weight"].shape[0]:
        with pytest.raises(UserError, match="belong to inputs"):
            run_in_memory(inputs, tmp_path, "diffusers")
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    mixed = one | {f"{module}.dora_scale": torch.ones(64, 1)}
    mixed |= {key.replace("to_q", "to_k"): tensor for key, tensor in one.items()}
    with pytest.raises(UserError, match="no dora_scale while others"):
        run_in_memory(mixed, tmp_path, "diffusers")
    assert text + ".alpha" in tensors


def test_alphas_come_back_as_they_were_and_folded_ones_do_not(tensors):
    from library.models.lora_convert import convert as convert_tensors

    whole = {key: torch.tensor(2) if key.endswith("alpha") else value for key, value in tensors.items()}
    there = convert_tensors(read_lora(whole, {}, where="test"), "diffusers")
    between = read_lora(dict(there.tensors.items()), there.metadata, where="test")
    assert_identical(dict(convert_tensors(between, "sd-scripts").tensors.items()), whole)
    folded = convert_tensors(between, "diffusers", fold_alpha=True)
    again = convert_tensors(read_lora(dict(folded.tensors.items()), folded.metadata, where="test"), "sd-scripts")
    for key, value in again.tensors.items():
        if key.endswith("alpha"):
            assert value == len(whole[key.replace(".alpha", ".lora_down.weight")])
        elif "lora_up" in key:
            name = key.removesuffix(".lora_up.weight")
            rank = len(whole[f"{name}.lora_down.weight"])
            torch.testing.assert_close(value, whole[key] * (2 / rank if f"{name}.alpha" in whole else 1.0))


def run_in_memory(tensors, folder, to):
    from library.models.lora_convert import convert as convert_tensors

    done = convert_tensors(read_lora(tensors, {}, where="test"), to)
    return dict(done.tensors.items())


BROKEN = {
    "not finite": {"lora_down.weight": torch.full((2, 4), float("nan")), "lora_up.weight": torch.ones(4, 2)},
    "is one number": {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2), "alpha": torch.ones(2)},
    "rank 0": {"lora_down.weight": torch.ones(0, 4), "lora_up.weight": torch.ones(4, 0)},
    "do not fit": {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 3)},
    "has no lora_up": {"lora_down.weight": torch.ones(2, 4)},
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_modules_are_named(what):
    tensors = {f"{TO_Q}.{tail}": tensor for tail, tensor in BROKEN[what].items()}
    with pytest.raises(UserError, match=what) as caught:
        read_lora(tensors, {}, where="file.safetensors")
    assert TO_Q in str(caught.value) and "file.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"], "Stable Diffusion 1.x"),
        (["model.diffusion_model.out.2.weight"], "whole checkpoint"),
        (["lora_unet_double_blocks_0_img_attn_proj.alpha"], "not a tensor of an SDXL LoRA"),
        ([f"{TO_Q}.alpha", "unet.conv_in.alpha"], "mixes two ways of naming"),
        ([f"{TO_Q}.alpha", TO_Q.replace("input_blocks_4_1", "down_blocks_1_attentions_0") + ".alpha"], "same tensor"),
        ([], "no tensors"),
    ],
)
def test_other_files_are_refused(keys, what):
    with pytest.raises(UserError, match=what):
        read_lora({key: torch.tensor(1.0) for key in keys}, {}, where="file")


def test_rslora_of_peft_becomes_alpha():
    key = "unet.down_blocks.1.attentions.0.proj_in"
    tensors = {f"{key}.lora_A.weight": torch.ones(4, 8), f"{key}.lora_B.weight": torch.ones(8, 4)}
    config = {"unet.r": 4, "unet.lora_alpha": 3, "unet.use_rslora": True}
    (alpha,) = [
        tensor
        for name, tensor in _converted(tensors, {"lora_adapter_metadata": json.dumps(config)}).items()
        if name.endswith("alpha")
    ]
    assert float(alpha) / 4 == pytest.approx(3 / 4**0.5)


def _converted(tensors, metadata):
    from library.models.lora_convert import convert as convert_tensors

    return dict(convert_tensors(read_lora(tensors, metadata, where="test"), "sd-scripts").tensors.items())


@pytest.mark.parametrize(("to", "reads"), [("diffusers", 2), ("sd-scripts-diffusers", 4), ("peft", 2)])
def test_the_bar_ends_where_it_should(source, tensors, tmp_path, to, reads):
    """Two reads of each tensor to write a file, two more for the hashes of a file that has them."""
    bar = MagicMock()
    arguments = Namespace(model=source, save_to=tmp_path / "out.safetensors", to=to, fold_alpha=False)
    assert run(arguments, bar=bar) == 0
    (total,), _ = bar.call_args
    told = sum(call.args[0] for call in bar.return_value.__enter__.return_value.update.call_args_list)
    written = len(tensors) - (0 if "sd" in to else sum(key.endswith("alpha") for key in tensors))
    assert told == total == reads * written
