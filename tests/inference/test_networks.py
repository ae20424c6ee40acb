"""Several networks at once: merged, live or added before a batch, with weights per network, block and prompt."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sdxl_gen_img
from library.config.block_weights import parse_block_weights, slot_of_block
from library.config.generate import GenerateOptions
from library.errors import UserError
from library.inference.adapters import adapter_roots, read_network
from library.inference.foreign import host_of
from library.inference.launch import encode_requests, generate
from library.inference.network_set import add_to_model, check_strengths, load_set
from library.inference.request import GenRequest
from library.sizes import Size
from networks import _foreign, lora
from networks._block_weights import block_factor, block_of

REQUEST = GenRequest(prompt="a red circle", negative="blurry", size=Size(64, 64), steps=1, scale=3.0, seed=3)
STEP = 1  # of 255: sums in another order may round a pixel differently


@pytest.fixture(scope="module")
def files(bundle, tmp_path_factory):
    """Two LoRAs and a LoKr of the tiny model: strong enough to change a picture visibly."""
    folder = tmp_path_factory.mktemp("networks")
    for number in (1, 2):
        g = torch.Generator().manual_seed(number)
        network = lora.create(adapter_roots(bundle), dim=4, alpha=4, generator=g, args={"conv_dim": "2"})
        for adapter in network.adapters.values():
            torch.nn.init.normal_(adapter.lora_up.weight, std=0.1, generator=g)
        save_file(network.export()[0], folder / f"{number}.safetensors")
    kohya = pytest.importorskip("lycoris.kohya")
    torch.manual_seed(3)
    args = {"algo": "lokr", "factor": "4", "preset": "attn-mlp", "warn_on_unmatched": ""}
    network = _foreign.create(kohya, host_of(bundle), dim=4, alpha=2.0, dropout=None, args=args)
    for unit in network.units:
        torch.nn.init.normal_(unit.lokr_w2_b if hasattr(unit, "lokr_w2_b") else unit.lokr_w2, std=0.3)
    tensors = {f"{unit.lora_name}.{name}": t for unit in network.units for name, t in unit.state_dict().items()}
    save_file(tensors, folder / "k.safetensors", {"ss_note": "of a test"})
    return {name: str(folder / f"{name}.safetensors") for name in ("1", "2", "k")}


@pytest.fixture(scope="module")
def drawn(bundle, files):
    """drawn("1k", [muls or None, ...], **options): pictures of a fresh copy of the model, as int16 arrays.

    What was drawn before is not drawn again.
    """
    known = {}

    def draw(names, muls=(None,), **options):
        key = repr((names, muls, options))
        if key not in known:
            known[key] = anew(names, muls, **options)
        return known[key]

    def anew(names, muls, **options):
        own = copy.copy(bundle)
        own.unet, own.text_encoder_1, own.text_encoder_2 = map(
            copy.deepcopy, (bundle.unet, bundle.text_encoder_1, bundle.text_encoder_2)
        )
        modules = ["lycoris.kohya" if name == "k" else "networks.lora" for name in names]
        settings = GenerateOptions(network_module=modules, network_weights=[files[n] for n in names], **options)
        networks = load_set(own, settings)
        requests = [GenRequest(**{**vars(REQUEST), "network_muls": m, "raw": "x"}) for m in muls]
        check_strengths(requests, networks, merged=False)
        before = [network.multiplier for network in networks]
        conditioning = encode_requests(own, requests, networks=networks)
        pictures = generate(own, requests, conditioning=conditioning, networks=networks)
        found = [np.asarray(picture).astype(np.int16) for _, picture in pictures]
        assert [network.multiplier for network in networks] == before
        return found if len(found) > 1 else found[0]

    return draw


def test_live_merged_partly_merged_and_pre_added_networks_draw_the_same_picture(drawn):
    strengths = {"network_mul": [0.7, 0.4, 0.9]}
    live = drawn("12k", **strengths)
    plain = drawn("")
    assert np.abs(live - plain).mean() > 5, "the networks show"
    for how in ({"network_merge": True}, {"network_merge_n_models": 2}, {"network_pre_calc": True}):
        assert np.abs(drawn("12k", **strengths, **how) - live).max() <= STEP, how
    for how in ({}, {"network_merge": True}):  # the order is of no account
        assert np.abs(drawn("k21", network_mul=[0.9, 0.4, 0.7], **how) - live).max() <= STEP, how


@pytest.mark.parametrize("how", [{}, {"network_pre_calc": True}])
def test_strengths_of_one_prompt_do_not_reach_the_next(drawn, how):
    a, off, b, again, one = drawn("1k", [None, (0.0,), (0.2, 1.0), None, (0.0, 1.0)], **how)
    assert np.array_equal(a, again)
    assert np.array_equal(off, drawn("")), "a network at 0 is not there, to the bit"
    assert np.abs(one - drawn("k")).max() <= STEP
    assert np.abs(a - b).mean() > 1 and np.abs(b - one).mean() > 1


def test_strengths_come_back_when_drawing_fails(bundle, files):
    own = copy.copy(bundle)
    own.unet = copy.deepcopy(bundle.unet)
    settings = GenerateOptions(network_module=["lora"], network_weights=[files["1"]], network_pre_calc=True)
    before = own.unet.conv_in.weight.clone(), [p.clone() for p in own.unet.parameters()]
    own.text_encoder_1 = own.text_encoder_2 = None
    networks = load_set(own, settings)
    (network,) = networks
    request = GenRequest(**{**vars(REQUEST), "network_muls": (0.0,)})
    with pytest.raises(AttributeError):
        encode_requests(own, [request], networks=networks)
    assert network.multiplier == 1.0
    network.set_multiplier(0.0)
    networks.refresh()
    assert all(torch.equal(p, q) for p, q in zip(own.unet.parameters(), before[1], strict=True))


def test_weights_of_blocks_act_like_a_network_without_the_other_blocks(drawn, files, bundle):
    some = ",".join("1" if 13 <= slot <= 19 else "0" for slot in range(26))  # MID, OUT00-OUT05
    for name in "1k":
        live = drawn(name, network_block_weights=[some])
        assert np.abs(live - drawn("")).max() > STEP and np.abs(live - drawn(name)).mean() > 1
        assert np.abs(drawn(name, network_block_weights=[some], network_merge=True) - live).max() <= STEP
    twelve = ",".join("1" if place >= 5 else "0" for place in range(12))
    u_net = ",".join("1" if 10 <= block < 19 else "0" for block in range(23))
    both = drawn("1", network_block_weights=[twelve]), drawn("1", network_block_weights=[u_net])
    assert not np.array_equal(*both), "23 weights leave the text encoders alone, 12 name them first"
    assert np.array_equal(drawn("1k", network_block_weights=["", ",".join("0" * 26)]), drawn("1"))


def test_changes_are_sums_from_the_models_own_weights(bundle, files):
    unet = copy.deepcopy(bundle.unet)
    own = copy.copy(bundle)
    own.unet, own.text_encoder_1, own.text_encoder_2 = (
        unet,
        *map(copy.deepcopy, (bundle.text_encoder_1, bundle.text_encoder_2)),
    )
    networks = [read_network(own, "networks.lora", Path(files[n]), 0.5) for n in "12"]
    name = "lora_unet_middle_block_1_proj_in"
    layer, plain = unet.mid_block.attentions[0].proj_in, bundle.unet.mid_block.attentions[0].proj_in.weight
    expected = plain.double()
    for network in networks:
        adapter = network.adapters[name]
        expected = expected + 0.5 * adapter.lora_up.weight.double() @ adapter.lora_down.weight.double()
    kept = add_to_model(networks, backup=True)
    assert torch.allclose(layer.weight.double(), expected, atol=1e-6)
    kept.restore()
    assert torch.equal(layer.weight, plain)


SLOTS = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (0, None),
    "lora_unet_time_embed_0": (1, 0),
    "lora_unet_label_emb_0_0": (1, 0),
    "lora_unet_input_blocks_0_0": (1, 1),
    "lora_unet_input_blocks_8_1_proj_in": (9, 9),
    "oft_unet_middle_block_2_in_layers_2": (13, 12),
    "lora_unet_output_blocks_0_1_proj_in": (14, 13),
    "lora_unet_output_blocks_8_0_out_layers_3": (22, 21),
    "lora_unet_out_2": (23, 22),
}


@pytest.mark.parametrize("name", SLOTS)
def test_blocks_are_those_of_sd_scripts(name):
    assert (slot_of_block(block_of(name)), block_of(name)) == SLOTS[name]


def test_short_lists_leave_the_blocks_alone_that_they_do_not_name():
    twelve = tuple(float(n) for n in range(2, 14))  # BASE 2, IN04 3, IN05 4, IN07 5, IN08 6, MID 7, OUT00-05 8-13
    names = {"te2_text_model_x": 2, "unet_input_blocks_4_1": 3, "unet_input_blocks_5_1": 4, "unet_input_blocks_7_1": 5}
    names |= {"unet_input_blocks_8_1": 6, "unet_middle_block_1": 7, "unet_output_blocks_5_1": 13}
    names |= {"unet_input_blocks_1_0": 1, "unet_output_blocks_6_0": 1}
    assert {name: block_factor(f"lora_{name}_x", twelve) for name in names} == names
    twenty = tuple(float(n) for n in range(20))
    names = {"unet_input_blocks_0_0": 1, "unet_input_blocks_8_1": 9, "unet_middle_block_0": 10, "te1_x": 0}
    names |= {"unet_output_blocks_0_0": 11, "unet_output_blocks_8_0": 19}
    assert {name: block_factor(f"lora_{name}_x", twenty) for name in names} == names
    assert block_factor("lora_unet_out_2", ()) == 1.0


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1,x", "not a list of numbers"),
        ("1,2,3", "has 3 weights"),
        (",".join("1" * 17), "SD 1.x"),
        ("inf," * 11 + "1", "finite"),
    ],
)
def test_wrong_block_weights_are_explained(text, what):
    with pytest.raises(ValueError, match=what):
        parse_block_weights(text)


def test_the_script_takes_third_party_networks_and_says_what_is_in_them(files, tmp_path, capsys):
    argv = f"--ckpt tiny --prompt red --outdir {tmp_path} --steps 1 --W 64 --H 64 --scale 1 --network_show_meta"
    two = ["--network_module", "lycoris.kohya", "networks.lora", "--network_weights", files["k"], files["1"]]
    assert sdxl_gen_img.main([*argv.split(), *two, "--network_merge_n_models", "1"]) == 0
    assert '"ss_note": "of a test"' in capsys.readouterr().out and len(list(tmp_path.glob("*.png"))) == 1
    assert sdxl_gen_img.main([*argv.split(), *two, "--prompt", "a --am 1,2,3"]) == 2
    assert "--am has 3 strengths" in capsys.readouterr().err


def test_a_file_of_which_nothing_fits_is_refused(bundle, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"lora_unet_elsewhere.lokr_w1": torch.ones(2, 2), "lora_unet_elsewhere.lokr_w2": torch.ones(2, 2)}, path)
    settings = GenerateOptions(network_module=["lycoris.kohya"], network_weights=[str(path)])
    with pytest.raises(UserError, match="finds no module of this file"):
        load_set(bundle, settings)
