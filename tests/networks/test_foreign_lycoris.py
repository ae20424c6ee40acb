"""lycoris.kohya on this suite's U-Net: sd-scripts' names, every algorithm trains, resumes, and its file reads back."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.kohya_view import text_encoder_view, unet_view
from networks import _foreign, dylora, lora, lora_fa
from networks._foreign_args import unread_args
from tests.networks.parts import filled, make_roots, predict, unet_inputs

kohya = pytest.importorskip("lycoris.kohya")

# Two linears and two convolutions, so that every algorithm is quick; `re.match` on sd-scripts' paths.
LINEARS = ["input_blocks.4.1.transformer_blocks.0.attn1.to_q", "input_blocks.4.1.proj_out"]
CONVOLUTIONS = ["input_blocks.1.0.in_layers.2", "output_blocks.3.0.skip_connection"]
NORMS = ["input_blocks.4.1.norm", "input_blocks.4.1.transformer_blocks.0.norm1"]
PRESET = """
enable_conv = true
unet_target_module = []
unet_target_name = {names}
text_encoder_target_module = []
"""
LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (2, 5, 64),
    "down_blocks.1.attentions.0.proj_out": (2, 5, 64),
    "down_blocks.0.resnets.0.conv1": (2, 32, 6, 6),
    "up_blocks.1.resnets.0.conv_shortcut": (2, 144, 6, 6),
    "down_blocks.1.attentions.0.norm": (2, 64, 6, 6),
    "down_blocks.1.attentions.0.transformer_blocks.0.norm1": (2, 5, 64),
}
ALGORITHMS = {
    "lora": {"algo": "lora"},
    "tucker": {"algo": "lora", "use_tucker": "True"},
    "dora": {"algo": "lora", "dora_wd": "True"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": "4"},
    "full": {"algo": "full"},
    "diag-oft": {"algo": "diag-oft"},
    "boft": {"algo": "boft"},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
    "norms too": {"algo": "lora", "train_norm": "True"},
    "rs and a scalar": {"algo": "lora", "rs_lora": "True", "use_scalar": "True"},
    "dora on inputs": {"algo": "lora", "dora_wd": "True", "wd_on_output": "False"},
    "tlora": {"algo": "tlora"},
}


def names_of(algo):
    """What an algorithm is tried on: tlora's convolutions do not work in 4.1.3."""
    return LINEARS if algo == "tlora" else LINEARS + CONVOLUTIONS + (NORMS if algo == "norms too" else [])


@pytest.fixture
def preset(tmp_path) -> Path:
    """Where the next network's preset is written."""
    return tmp_path / "few.toml"


def host_on(unet):
    return _foreign.Host([], unet_view(unet), None)


def built(tiny_unet, preset, algo):
    """(a copy of the U-Net, a network of few layers on it), always with the same initial weights."""
    unet = copy.deepcopy(tiny_unet).requires_grad_(False)
    torch.manual_seed(5)
    preset.write_text(PRESET.format(names=json.dumps(names_of(algo))))
    args = {**ALGORITHMS[algo], "preset": str(preset), "warn_on_unmatched": ""}
    network = _foreign.create(kohya, host_on(unet), dim=4, alpha=2.0, dropout=None, args=args)
    network.apply(text_encoders=False, unet=True)
    return unet, network


def optimizer_of(network):
    groups = network.param_groups(text_encoder_lrs=[], unet_lr=None, default_lr=0.02)
    return torch.optim.AdamW(groups)


def outputs(unet, seed=9):
    """What the layers make of random inputs."""
    g = torch.Generator().manual_seed(seed)
    found = [unet.get_submodule(path)(torch.randn(shape, generator=g)) for path, shape in LAYERS.items()]
    return torch.cat([out.flatten() for out in found])


def steps(unet, optimizer, numbers):
    for number in numbers:
        loss = outputs(unet, number).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_names_are_sd_scripts_names_with_the_default_preset(tiny_roots):
    te1, te2, unet = (root.module for root in tiny_roots)
    host = _foreign.Host([text_encoder_view(te1), text_encoder_view(te2)], unet_view(unet), None)
    network = _foreign.create(kohya, host, dim=4, alpha=1.0, dropout=None, args={"warn_on_unmatched": ""})
    names = [unit.lora_name for unit in network.units]
    ours = lora.create(tiny_roots, dim=1, alpha=1, args={"conv_dim": "1"}).adapters
    assert len(names) == len(set(names)) and set(names) == set(ours)
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in names
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1" in names
    attention = _foreign.create(kohya, host, dim=4, alpha=1.0, dropout=None, args={"preset": "attn-only"})
    in_unet = [unit.lora_name for unit in attention.units if "unet" in unit.lora_name]
    assert in_unet and all("_attn1_" in name or "_attn2_" in name for name in in_unet)


def test_the_view_has_the_models_own_layers_under_sd_scripts_names_and_classes(tiny_unet):
    view = dict(unet_view(tiny_unet).named_modules())
    assert view["input_blocks.4.1.proj_in"] is tiny_unet.down_blocks[1].attentions[0].proj_in
    assert view["output_blocks.2.2.conv"] is tiny_unet.up_blocks[0].upsamplers[0].conv
    classes = {path: type(module).__name__ for path, module in view.items()}
    expected = {"": "SdxlUNet2DConditionModel", "input_blocks.3.0": "Downsample2D", "output_blocks.5.2": "Upsample2D"}
    expected |= {"middle_block.0": "ResnetBlock2D", "middle_block.1": "Transformer2DModel"}
    expected |= {"middle_block.1.transformer_blocks.0.attn1": "CrossAttention", "time_embed": "ModuleList"}
    assert {path: classes[path] for path in expected} == expected
    held = {id(p) for p in tiny_unet.parameters()}
    assert held == {id(p) for p in unet_view(tiny_unet).parameters()}, "no weight of the model is out of reach"
    assert unet_view(tiny_unet).config.in_channels == 4 and unet_view(tiny_unet).dtype == torch.float32
    with pytest.raises(UserError, match="whole Transformer2DModel"):
        view["middle_block.1"].forward = lambda x: x


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_each_algorithm_starts_as_the_base_trains_and_resumes_to_the_bit(tiny_unet, preset, algo):
    base = outputs(tiny_unet)
    unet, network = built(tiny_unet, preset, algo)
    assert torch.allclose(outputs(unet), base, atol=1e-5)
    optimizer = optimizer_of(network)
    steps(unet, optimizer, [0, 1])
    raw = {name: value.detach().clone() for name, value in network.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict())
    steps(unet, optimizer, [2])
    again, second = built(tiny_unet, preset, algo)
    resumed = optimizer_of(second)
    second.load_state_dict(raw)
    resumed.load_state_dict(moments)
    steps(again, resumed, [2])
    assert torch.equal(outputs(again), outputs(unet))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in network.state_dict().items())
    assert float((outputs(unet) - base).abs().max()) > 1e-4


@torch.no_grad()
def added(network, onto, base):
    """A copy of `base` with the network's changes added to its weights; `onto` is the model that it was built on."""
    merged = copy.deepcopy(base)
    layers = {id(layer): same for layer, same in zip(onto.modules(), merged.modules(), strict=True)}
    for layer, change in network.changes():
        for name, value in change().items():
            getattr(layers[id(layer)], name).add_(value)
    return merged


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_file_of_each_algorithm_gives_the_same_output_live_and_added(tiny_unet, preset, algo, tmp_path):
    unet, network = built(tiny_unet, preset, algo)
    steps(unet, optimizer_of(network), [0, 1])
    path = str(tmp_path / "net.safetensors")
    network.network.save_weights(path, None, {})
    trained = outputs(unet).detach()
    started, second = built(tiny_unet, preset, algo)  # --network_weights
    second.load(path)
    assert torch.allclose(outputs(started), trained, atol=1e-5)
    fresh = copy.deepcopy(tiny_unet).requires_grad_(False)
    if algo == "ia3":
        with pytest.raises(UserError, match=r"lycoris\.kohya failed with TypeError"):  # its own defect in 4.1.3
            _foreign.create_from_weights(kohya, host_on(fresh), path)
        return
    if algo == "dora on inputs":
        with pytest.raises(UserError, match="magnitudes of inputs"):
            _foreign.create_from_weights(kohya, host_on(fresh), path)
        return
    loaded = _foreign.create_from_weights(kohya, host_on(fresh), path, for_inference=True)
    merged = added(loaded, fresh, tiny_unet)
    loaded.attach()
    assert len(loaded.units) == len(names_of(algo))
    assert torch.allclose(outputs(fresh), trained, atol=1e-5)
    assert torch.allclose(outputs(merged), trained, atol=1e-5)


@pytest.mark.parametrize("algo", ["lora", "rs and a scalar"])
def test_our_own_kind_reads_the_loras_of_lycoris(tiny_unet, preset, algo, tmp_path):
    unet, network = built(tiny_unet, preset, algo)
    steps(unet, optimizer_of(network), [0, 1])
    path = tmp_path / "net.safetensors"
    network.network.save_weights(str(path), None, {})
    fresh = copy.deepcopy(tiny_unet)
    read = lora.create_from_weights(make_roots(fresh), load_file(path)).eval().attach()
    assert len(read.adapters) == 4
    assert torch.allclose(outputs(fresh), outputs(unet), atol=1e-5)


@pytest.mark.parametrize("kind", [lora, lora_fa, dylora])
def test_lycoris_reads_our_loras(tiny_roots, tiny_unet, kind, tmp_path):
    g = torch.Generator().manual_seed(4)
    network = filled(kind.create(tiny_roots, dim=4, alpha=2.0, args={"conv_dim": "4"}, generator=g).eval(), size=0.05)
    save_file(network.export()[0], tmp_path / "ours.safetensors")
    base, models = predict(tiny_unet, unet_inputs()), [copy.deepcopy(root.module) for root in tiny_roots]
    network.attach()
    wanted = predict(tiny_unet, unet_inputs())
    network.detach()
    te1, te2, unet = models
    host = _foreign.Host([text_encoder_view(te1), text_encoder_view(te2)], unet_view(unet), None)
    read = _foreign.create_from_weights(kohya, host, str(tmp_path / "ours.safetensors"), for_inference=True)
    assert len(read.units) == len(network.adapters)
    read.attach()
    assert (wanted - base).abs().max() > 0.01
    assert (predict(unet, unet_inputs()) - wanted).abs().max() < 1e-4


def test_settings_of_one_network_do_not_reach_the_next(tiny_unet, preset):
    before = list(kohya.LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE)
    built(tiny_unet, preset, "glora")
    assert before == kohya.LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE


def test_arguments_that_lycoris_does_not_know_are_announced():
    assert unread_args(kohya, ["algo", "preset", "conv_dim", "dora_wd", "factor", "disable_conv_cp", "dropout"]) == []
    (sentence,) = unread_args(kohya, ["algorithm", "algo"])
    assert "does not read algorithm," in sentence and "did you mean algo?" in sentence
