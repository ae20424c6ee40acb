"""Resizing keeps the largest singular values and the strength; ranks follow the rules; DyLoRA slices; the report."""

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.inference.lora_tools import norms
from library.inference.lora_tools.norms import module_norms
from tests.tools.reference import delta_of, deltas_of, modules_of, relative
from tools import check_lora, extract_lora_from_dylora, resize_lora


def run(model, out, *more):
    return resize_lora.main(["--model", str(model), "--save_to", str(out), *map(str, more)])


def is_4d(name):
    return name.endswith(("_op", "in_layers_2", "out_layers_3", "skip_connection", "_2_conv"))


def test_a_fixed_rank_keeps_the_largest_values_and_the_strength(few, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert run(few, out, "--new_rank", 2, "--new_conv_rank", 1) == 0
    before, after = modules_of(few), modules_of(out)
    error = whole = 0.0
    for name, module in before.items():
        rank = 1 if is_4d(name) else 2
        assert len(after[name]["down"]) == rank
        scale = float(module["alpha"]) / len(module["down"])
        assert float(after[name]["alpha"]) == pytest.approx(scale * rank)
        exact = delta_of(module)
        left_out = np.sum(scipy.linalg.svdvals(exact)[rank:] ** 2)
        assert np.sum((delta_of(after[name]) - exact) ** 2) == pytest.approx(left_out, rel=1e-4, abs=1e-10)
        if "unet" in name:
            error, whole = error + left_out, whole + np.sum(exact**2)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("U-Net"))
    assert float(line.split()[2]) == pytest.approx(np.sqrt(whole), rel=1e-4)
    assert float(line.split()[3]) == pytest.approx(np.sqrt(error / whole), rel=2e-3)


def test_a_larger_rank_changes_nothing(few, tmp_path):
    out = tmp_path / "out.safetensors"
    run(few, out, "--new_rank", 7)
    after, wanted = deltas_of(out), deltas_of(few)
    assert max(relative(after[name], wanted[name]) for name in wanted) < 1e-5
    assert {len(module["down"]) for module in modules_of(out).values()} == {7}


def golden_ranks(path, method, param, cap):
    """The rules of lora_format.md section 9 on scipy's singular values of up @ down without alpha."""
    ranks = {}
    for name, module in modules_of(path).items():
        values = scipy.linalg.svdvals(module["up"] @ module["down"])
        if values[0] <= 1e-6:
            ranks[name] = 1
            continue
        if method == "sv_ratio":
            index = int(np.sum(values > values[0] / param))
        else:
            weights, share = (values, param) if method == "sv_cumulative" else (values**2, param**2)
            index = int(np.argmax(np.cumsum(weights) / np.sum(weights) >= share)) + 1
        ranks[name] = min(max(1, min(index, len(values) - 1)) + 1, cap)
    return ranks


@pytest.mark.parametrize(("method", "param"), [("sv_ratio", 1.3), ("sv_cumulative", 0.4), ("sv_fro", 0.7)])
def test_dynamic_ranks(few, tmp_path, capsys, changed, method, param):
    zero = "lora_unet_middle_block_1_proj_in.lora_up.weight"
    model = changed(few, {zero: torch.zeros_like(load_file(few)[zero])})
    out = tmp_path / "out.safetensors"
    run(model, out, "--new_rank", 3, "--dynamic_method", method, "--dynamic_param", param, "--verbose")
    wanted = golden_ranks(model, method, param, 3)
    after, before = modules_of(out), modules_of(model)
    assert {name: len(module["down"]) for name, module in after.items()} == wanted
    assert {1, 2, 3} == set(wanted.values())
    for name, module in after.items():
        scale = float(before[name]["alpha"]) / len(before[name]["down"])
        assert float(module["alpha"]) == pytest.approx(scale * wanted[name])
    told = capsys.readouterr()
    assert "rank 4 -> " in told.out + told.err
    with safe_open(out, "pt") as file:
        found = file.metadata()
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_metadata_is_kept_and_told_what_happened(second, tmp_path):
    out = tmp_path / "out.safetensors"
    run(second, out, "--new_rank", 2, "--save_precision", "fp16")
    with safe_open(out, "pt") as file:
        found = file.metadata()
    assert found["ss_training_comment"] == "rank 3 resized to 2; made for a test"
    assert found["ss_network_dim"] == "2" and float(found["ss_network_alpha"]) == pytest.approx(2 / 3)
    assert found["sshs_model_hash"] != "old" and len(found["sshs_legacy_hash"]) == 8
    assert {v.dtype for k, v in load_file(out).items() if not k.endswith("alpha")} == {torch.float16}


def test_pefts_spelling_is_read_and_kept(few, tmp_path):
    spelled = {}
    for key, value in load_file(few).items():
        name, _, tail = key.partition(".")
        tail = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}.get(tail)
        if tail:
            spelled[f"unet.{name}.{tail}"] = value
    save_file(spelled, tmp_path / "peft.safetensors")
    run(tmp_path / "peft.safetensors", tmp_path / "out.safetensors", "--new_rank", 2)
    found = load_file(tmp_path / "out.safetensors")
    assert {key for key in found if not key.endswith(".alpha")} == spelled.keys()
    name = "unet.lora_unet_middle_block_1_proj_in"
    assert found[f"{name}.lora_A.weight"].shape[0] == 2 and float(found[f"{name}.alpha"]) == 2


def test_units_of_a_dylora(second, tmp_path):
    argv = ["--model", str(second), "--unit", "1", "--save_to", str(tmp_path / "net.safetensors")]
    assert extract_lora_from_dylora.main(argv) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net-0001.safetensors", "net-0002.safetensors"]
    whole, part = modules_of(second), modules_of(tmp_path / "net-0002.safetensors")
    for name, module in whole.items():
        assert np.array_equal(part[name]["down"], module["down"][:2])
        assert np.array_equal(part[name]["up"], module["up"][:, :2])
        assert part[name]["alpha"] == module["alpha"]
    assert extract_lora_from_dylora.main([*argv, "--scale_as_trained"]) == 0
    name = "lora_unet_middle_block_1_proj_in"
    trained = 1 / 3 * np.sqrt(3 / 2) * whole[name]["up"][:, :2] @ whole[name]["down"][:2]  # alpha / r * sqrt(r / k)
    assert relative(deltas_of(tmp_path / "net-0002.safetensors")[name], trained) < 1e-6
    with safe_open(tmp_path / "net-0002.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"


def test_a_unit_that_does_not_fit(second, first, tmp_path, capsys):
    for model, unit, says in ((second, 2, "give one of 1"), (second, 3, "give one of 1"), (first, 1, "[2, 4]")):
        argv = ["--model", str(model), "--unit", str(unit), "--save_to", str(tmp_path / "net.safetensors")]
        assert extract_lora_from_dylora.main(argv) == 2
        assert says in capsys.readouterr().err


def test_norms_are_those_of_the_changes(first):
    wanted = {name: np.linalg.norm(delta) for name, delta in deltas_of(first).items()}
    found = {one.name: one for one in module_norms(str(first))}
    assert found.keys() == wanted.keys()
    assert all(found[name].norm == pytest.approx(norm, rel=1e-4) for name, norm in wanted.items())
    one = found["lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"]
    assert (one.block, one.kind, one.rank, one.alpha) == ("IN04", "attn2", 4, 2.0)
    assert one.rms == pytest.approx(np.sqrt(np.mean(deltas_of(first)[one.name] ** 2)), rel=1e-4)
    assert found["lora_te2_text_model_encoder_layers_1_mlp_fc2"].block == "te2 layer 1"
    assert found["lora_unet_output_blocks_8_0_skip_connection"].block == "OUT08"


def test_sums_over_modules_are_those_of_all_their_weights(first):
    found, deltas = module_norms(str(first)), deltas_of(first).values()
    total, count = np.sqrt(sum(np.sum(delta**2) for delta in deltas)), sum(delta.size for delta in deltas)
    row = norms._row("all", found).split()
    assert int(row[1]) == len(found) and float(row[3]) == pytest.approx(total, rel=1e-3)
    assert float(row[5]) == pytest.approx(total / np.sqrt(count), rel=1e-3)
    assert norms._rms(found) == pytest.approx(total / np.sqrt(count), rel=1e-4)


def test_the_report_names_broken_modules_and_draws(few, tmp_path, capsys, changed):
    tensors = load_file(few)
    nan, zero, untrained = (
        f"lora_unet_middle_block_1_{name}" for name in ("proj_in", "proj_out", "transformer_blocks_0_attn1_to_q")
    )
    changes = {f"{nan}.lora_up.weight": tensors[f"{nan}.lora_up.weight"] * float("nan")}
    for tail in ("lora_up.weight", "lora_down.weight"):
        changes[f"{zero}.{tail}"] = tensors[f"{zero}.{tail}"] * 0
    changes[f"{untrained}.lora_up.weight"] = tensors[f"{untrained}.lora_up.weight"] * 0
    path, picture = changed(few, changes), tmp_path / "norms.png"
    assert check_lora.main([str(path), "--png", str(picture), "--show_all_keys"]) == 1
    printed = capsys.readouterr().out
    assert f"NaN or infinity: 1 of {len(modules_of(few))} modules: {nan}" in printed
    assert f"zero: 1 of {len(modules_of(few))} modules: {zero}" in printed
    assert f"untrained: 1 of {len(modules_of(few))} modules: {untrained}" in printed
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    line = next(line for line in printed.splitlines() if line.startswith(key))
    assert f"mean |w| {float(tensors[key].abs().mean()):.6g}" in line
    image = Image.open(picture)
    assert image.format == "PNG" and image.width == 1100
    assert (np.asarray(image.convert("RGB"), int) - [0x1F, 0x4E, 0x79] == 0).all(-1).sum() > 1000  # bars
    assert check_lora.main([str(few)]) == 0
