"""LoRA with LoRA: the sum of the weighted changes, exactly or as the best approximation of a rank."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open

from library.io.hashing import network_hashes
from library.io.safetensors_file import TensorReader
from tests.tools.reference import deltas_of, modules_of, relative
from tools import merge_lora, svd_merge_lora


def arguments(models, ratios, out, *more):
    return ["--models", *map(str, models), "--ratios", *map(str, ratios), "--save_to", str(out), *more]


def total(*terms):
    """The sum of weight * change over (file, weight or {name: weight})."""
    sums = {}
    for path, weight in terms:
        for name, delta in deltas_of(path).items():
            factor = weight.get(name, 1.0) if isinstance(weight, dict) else weight
            sums[name] = sums.get(name, 0) + factor * delta
    return sums


@pytest.mark.parametrize("more", [(), ("--concat",), ("--shuffle",)])
def test_the_result_is_the_sum_of_the_weighted_changes(first, second, tmp_path, more):
    out = tmp_path / "out.safetensors"
    assert merge_lora.main(arguments([first, second], [0.8, -1.5], out, *more)) == 0
    found, wanted = deltas_of(out), total((first, 0.8), (second, -1.5))
    assert found.keys() == wanted.keys()
    assert max(relative(found[name], wanted[name]) for name in wanted) < 1e-6
    modules = modules_of(out)
    assert len(modules["lora_unet_middle_block_1_proj_in"]["down"]) == 7
    assert len(modules["lora_unet_input_blocks_3_0_op"]["down"]) == 2
    assert all(float(module["alpha"]) == len(module["down"]) for module in modules.values())


def test_shuffling_moves_ranks(first, second, tmp_path):
    for name, more in (("a", ()), ("b", ("--shuffle",))):
        merge_lora.main(arguments([first, second], [1, 1], tmp_path / f"{name}.safetensors", *more))
    a, b = (modules_of(tmp_path / f"{name}.safetensors") for name in "ab")
    name = "lora_unet_middle_block_1_proj_in"
    assert not np.array_equal(a[name]["down"], b[name]["down"])
    assert sorted(map(tuple, a[name]["down"])) == sorted(map(tuple, b[name]["down"]))


def test_block_weights_enter_once(first, tmp_path):
    out = tmp_path / "out.safetensors"
    merge_lora.main(arguments([first], [2.0], out, "--lbws", json.dumps([0.5] * 26)))
    found, wanted = deltas_of(out), total((first, 1.0))
    assert max(relative(found[name], wanted[name]) for name in wanted) < 1e-6


def test_svd_is_the_best_approximation_of_the_rank(first, second, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    argv = arguments([first, second], [0.8, 0.5], out, "--new_rank", "3", "--new_conv_rank", "1")
    assert svd_merge_lora.main(argv) == 0
    found, wanted = deltas_of(out), total((first, 0.8), (second, 0.5))
    squares = {"te1": [0, 0], "te2": [0, 0], "unet": [0, 0]}
    for name, exact in wanted.items():
        conv = name.endswith(("_op", "in_layers_2", "out_layers_3", "skip_connection", "_2_conv"))
        values = scipy.linalg.svdvals(exact)
        left_out = np.sum(values[1 if conv else 3 :] ** 2)
        assert np.sum((found[name] - exact) ** 2) == pytest.approx(left_out, rel=1e-4, abs=1e-10)
        sums = squares[name.split("_")[1]]
        sums[0], sums[1] = sums[0] + left_out, sums[1] + np.sum(values**2)
    lines = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    for part, title in (("te1", "text encoder 1"), ("unet", "U-Net")):
        error, whole = squares[part]
        assert float(lines[title][1]) == pytest.approx(np.sqrt(whole), rel=1e-4)
        assert float(lines[title][2]) == pytest.approx(np.sqrt(error / whole), rel=2e-3)


def test_merge_lora_with_a_rank_does_the_same(first, second, tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    merge_lora.main(arguments([first, second], [1, 1], a, "--new_rank", "2"))
    svd_merge_lora.main(arguments([first, second], [1, 1], b, "--new_rank", "2"))
    ours, theirs = modules_of(a), modules_of(b)
    assert all(np.array_equal(ours[name]["down"], theirs[name]["down"]) for name in theirs)


def test_metadata_and_hashes(first, second, tmp_path):
    out = tmp_path / "both.safetensors"
    merge_lora.main(arguments([first, second], [0.8, 0.5], out, "--save_precision", "fp16"))
    with safe_open(out, "pt") as file:
        found = file.metadata()
    assert found["ss_network_module"] == "networks.lora" and found["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert found["ss_training_comment"] == "merged from first x 0.8 + second x 0.5"
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (found["modelspec.title"], found["modelspec.merged_from"]) == ("both", "first, second")
    reader = TensorReader(out)
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == network_hashes(dict(reader), found)
    assert {value.dtype for key, value in reader.items() if not key.endswith("alpha")} == {torch.float16}
    merge_lora.main(arguments([second, second], [0.8, 0.5], out, "--no_metadata"))
    found = TensorReader(out).metadata
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("6", "6.0")
    assert "ss_training_comment" not in found and "modelspec.merged_from" not in found
