"""What a LoRA file holds, what loading accepts, and what it refuses with which words."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from networks import lora
from tests.networks.parts import filled, predict, sai_name, unet_inputs


@pytest.fixture(scope="module")
def network(tiny_roots):
    return filled(lora.create(tiny_roots, dim=4, alpha=2.0, args={"conv_dim": "2"}).eval(), size=0.05)


@pytest.fixture
def tensors(network):
    return network.export()[0]


def rename_unet_to_diffusers(tensors, unet):
    """The same file with diffusers' module names, as other trainers write it."""
    names = {}
    for path, _ in unet.named_modules():
        try:
            names["lora_unet_" + sai_name(path).replace(".", "_")] = "lora_unet_" + path.replace(".", "_")
        except (KeyError, IndexError, ValueError):
            continue
    return {
        f"{names.get(k.partition('.')[0], k.partition('.')[0])}.{k.partition('.')[2]}": v for k, v in tensors.items()
    }


def test_the_file_has_three_tensors_a_module_and_alpha_is_a_float32_scalar(network):
    tensors, facts = network.export(dtype=torch.float16)
    assert len(tensors) == 3 * len(network.adapters)
    for key, value in tensors.items():
        tail = key.partition(".")[2]
        assert tail in ("lora_down.weight", "lora_up.weight", "alpha")
        assert value.device.type == "cpu" and value.is_contiguous()
        wanted = (torch.float32, 0) if tail == "alpha" else (torch.float16, value.ndim)
        assert (value.dtype, value.ndim) == wanted
    assert facts["ss_network_module"] == "networks.lora"
    assert (facts["ss_network_dim"], facts["ss_network_alpha"]) == ("4", "2.0")


def test_saved_and_loaded_it_gives_the_same_output(network, tiny_roots, tiny_unet, tmp_path):
    inputs = unet_inputs()
    network.attach()
    wanted = predict(tiny_unet, inputs)
    network.detach()
    save_file(network.export()[0], tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    again = lora.create(tiny_roots, dim=4, alpha=1.0, args={"conv_dim": "2"}).eval()
    report = again.load(tensors)
    assert (report.loaded, report.missing, report.unexpected) == (len(network.adapters), (), ())
    for loaded in (again, lora.create_from_weights(tiny_roots, tensors).eval()):
        loaded.attach()
        assert torch.equal(predict(tiny_unet, inputs), wanted)
        loaded.detach()


def test_the_alpha_of_the_file_is_in_force_after_loading(tiny_roots, tensors):
    other = lora.create(tiny_roots, dim=4, alpha=4.0, args={"conv_dim": "2"})
    other.load(tensors)
    name = "lora_unet_middle_block_1_proj_in"
    assert other.adapters[name].scale == 0.5
    state = other.state_dict()
    state[f"adapters.{name}.alpha"] = torch.tensor(1.0)
    other.load_state_dict(state)
    assert other.adapters[name].scale == 0.25


def test_diffusers_named_files_are_understood(network, tiny_roots, tiny_unet, tensors):
    renamed = rename_unet_to_diffusers(tensors, tiny_unet)
    assert any("up_blocks" in key for key in renamed) and not any("output_blocks" in key for key in renamed)
    again = lora.create_from_weights(tiny_roots, renamed)
    exported = again.export()[0]
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[key], value) for key, value in tensors.items())


def test_ranks_come_from_the_file(tiny_roots, tensors):
    again = lora.create_from_weights(tiny_roots, tensors)
    assert again.facts["ss_network_dim"] == "Dynamic"
    assert again.adapters["lora_unet_input_blocks_3_0_op"].rank == 2


def test_modules_outside_the_default_targets_load_too(tiny_roots, tensors):
    extra = {
        "lora_unet_time_embed_0.lora_down.weight": torch.randn(3, 32),
        "lora_unet_time_embed_0.lora_up.weight": torch.randn(128, 3),
    }
    again = lora.create_from_weights(tiny_roots, tensors | extra)
    adapter = again.adapters["lora_unet_time_embed_0"]
    assert adapter.rank == 3 and adapter.scale == 1.0  # no alpha in the file: the rank


def test_missing_and_unexpected_modules_are_counted(tiny_roots, tensors):
    plain = lora.create(tiny_roots, dim=4, alpha=1)
    only_unet = {k: v for k, v in tensors.items() if k.startswith("lora_unet")}
    report = plain.load(only_unet)
    assert len(report.missing) == plain.count("te1") + plain.count("te2")
    assert len(report.unexpected) == 66
    assert str(report) == f"{plain.count('unet')} modules loaded, 36 not in the file, 66 only in the file"


def test_an_integer_alpha_as_sd_scripts_writes_it(tiny_roots, tensors):
    tensors = {k: v.long() if k.endswith("alpha") else v for k, v in tensors.items()}
    assert lora.create_from_weights(tiny_roots, tensors).adapters["lora_unet_middle_block_1_proj_in"].scale == 0.5


def problem(roots, tensors):
    with pytest.raises(UserError) as error:
        lora.create_from_weights(roots, tensors)
    assert error.value.problems[0].fix
    return error.value.problems[0].what


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "1.x or 2.x"),
        ("lora_unet_middle_block_1_proj_in.dora_scale", "DoRA"),
        ("lora_unet_middle_block_1_proj_in.hada_w1_a", "LoHa"),
        ("lora_unet_middle_block_1_proj_in.oft_blocks", "OFT of LyCORIS"),
        ("lora_unet_middle_block_1_proj_in.lora_mid.weight", "Tucker"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "diffusers or PEFT"),
        ("model.diffusion_model.out.2.weight", "whole checkpoint"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "none of its"),
    ],
)
def test_foreign_files_are_named(tiny_roots, key, words):
    assert words in problem(tiny_roots, {key: torch.zeros(4, 4)})


def test_a_file_whose_unet_is_another_models_is_refused_though_its_text_encoder_fits(tiny_roots, tensors):
    mixed = {k: v for k, v in tensors.items() if k.startswith("lora_te1")}
    for tail in ("lora_down.weight", "lora_up.weight"):
        mixed[f"lora_unet_double_blocks_0_img_attn_qkv.{tail}"] = torch.zeros(4, 4)
    assert "lora_unet_double_blocks" in problem(tiny_roots, mixed)


def test_wrong_widths_wrong_ranks_and_incomplete_modules_are_named(tiny_roots, tensors):
    name = "lora_unet_middle_block_1_proj_in"
    wide = dict(tensors) | {f"{name}.lora_down.weight": torch.zeros(4, 96)}
    assert "(4, 96)" in problem(tiny_roots, wide) and name in problem(tiny_roots, wide)
    half = {k: v for k, v in tensors.items() if k != f"{name}.lora_up.weight"}
    assert "lora_up.weight" in problem(tiny_roots, half) and "missing" in problem(tiny_roots, half)
    with pytest.raises(UserError) as error:
        lora.create(tiny_roots, dim=8, alpha=1, args={"conv_dim": "2"}).load(tensors)
    assert "rank 4 in the file, the network has 8" in error.value.problems[0].what
    assert "to 4" in error.value.problems[0].fix
    assert problem(tiny_roots, {}) == "the file holds no tensors"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_down.weight": torch.full((4, 80), torch.nan)}, "not finite"),
        ({"lora_up.weight": torch.full((80, 4), torch.inf)}, "not finite"),
        ({"alpha": torch.ones(4)}, "shape (4,), and is one number"),
        ({"lora_down.weight": torch.zeros(0, 80), "lora_up.weight": torch.zeros(80, 0)}, "a rank of 0"),
    ],
)
def test_broken_values_are_named_with_their_tensor(tiny_roots, tensors, changes, words):
    name = "lora_unet_middle_block_1_proj_in"
    broken = dict(tensors) | {f"{name}.{tail}": value for tail, value in changes.items()}
    what = problem(tiny_roots, broken)
    assert words in what and name in what


def test_names_of_two_programs_in_one_file_are_refused(tiny_roots, tensors):
    mixed = dict(tensors) | {"lycoris_unet_middle_block_1_proj_in.lora_down.weight": torch.zeros(4, 80)}
    what = problem(tiny_roots, mixed)
    assert "mixes names of several programs" in what and "lycoris_unet_" in what


def test_one_module_under_both_its_names_is_refused(tiny_roots, tensors):
    twice = dict(tensors) | {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0)}
    assert "under two names" in problem(tiny_roots, twice)


def test_missing_alphas_are_counted(tiny_roots, tensors, caplog):
    name = "lora_unet_middle_block_1_proj_in"
    network = lora.create_from_weights(tiny_roots, {k: v for k, v in tensors.items() if k != f"{name}.alpha"})
    assert network.adapters[name].scale == 1.0
    assert f"1 of its {len(network.adapters)} modules have no alpha" in caplog.text


def test_a_truncated_file_is_named(network, tmp_path):
    from library.io.safetensors_file import TensorReader

    path = tmp_path / "lora.safetensors"
    save_file(network.export()[0], path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError) as error:
        TensorReader(path)
    assert "lora.safetensors" in str(error.value.problems[0].where) or "lora.safetensors" in str(error.value)
