"""Merged checkpoints against the sums written out, block by block."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.config.block_weights import MERGE_SLOTS, parse_block_weights
from library.models import checkpoint
from library.models.merge_tool import Recipe
from tools.merge_models import main

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def models(tiny_path, tmp_path_factory):
    """Three models of the tiny one's shapes, their tensors and their paths."""
    folder = tmp_path_factory.mktemp("merge")
    with safe_open(tiny_path, "pt") as file:
        metadata = file.metadata()
    found = {}
    for number, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            key: (tensor.float() + 0.1 * number * torch.randn(tensor.shape, generator=generator)).half()
            for key, tensor in load_file(tiny_path).items()
        }
        save_file(tensors, folder / f"{name}.safetensors", metadata)
        found[name] = (str(folder / f"{name}.safetensors"), tensors)
    return found


def merge(models, names, output, *flags):
    paths = [models[name][0] for name in names]
    assert main(["--models", *paths, "--output", str(output), *flags]) == 0
    return load_file(output)


def assert_sum(found, models, names, shares_of, atol=1e-6):
    first = models[names[0]][1]
    assert found.keys() == first.keys()
    for key in first:
        expected = sum(share * models[name][1][key].float() for name, share in zip(names, shares_of(key), strict=True))
        torch.testing.assert_close(found[key].float(), expected, atol=atol, rtol=1e-5, msg=key)


def test_weighted_sum(models, tmp_path):
    found = merge(models, "abc", tmp_path / "out.safetensors", "--ratios", "0.5", "0.3", "0.2")
    assert_sum(found, models, "abc", lambda key: (0.5, 0.3, 0.2))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert_sum(merge(models, "ab", tmp_path / "mean.safetensors"), models, "ab", lambda key: (0.5, 0.5))


def test_the_result_is_a_model(models, tmp_path):
    merge(models, "ab", tmp_path / "out.safetensors", "--saving_precision=fp16")
    bundle = checkpoint.load_bundle(str(tmp_path / "out.safetensors"))
    assert bundle.prediction_type == "epsilon"
    assert bundle.metadata["modelspec.merged_from"] == "a, b" and bundle.metadata["modelspec.title"] == "out"


def test_added_difference(models, tmp_path):
    flags = ("--add_difference", "--ratios", "0.7")
    found = merge(models, "abc", tmp_path / "out.safetensors", *flags)
    assert_sum(found, models, "abc", lambda key: (1.0, 0.7, -0.7))


def test_only_the_unet(models, tmp_path):
    found = merge(models, "ab", tmp_path / "o.safetensors", "--unet_only", "--ratios", "0.25", "0.75")
    assert_sum(found, models, "ab", lambda key: (0.25, 0.75) if key.startswith(UNET) else (1.0, 0.0))


def slot(key):
    """The place of a key in a list of 20 (BASE, IN00-IN08, MID, OUT00-OUT08), None where it has none; by hand."""
    if not key.startswith(UNET):
        return 0
    kind, number = key.removeprefix(UNET).split(".")[:2]
    table = {"time_embed": 1, "label_emb": 1, "input_blocks": 1 + int(number), "middle_block": 10}
    table |= {"output_blocks": 11 + int(number)}
    return table.get(kind)


def test_block_weights_of_twenty(models, tmp_path):
    weights = [0.02 * (number + 1) for number in range(20)]
    found = merge(models, "ab", tmp_path / "out.safetensors", "--lbws", json.dumps(weights))

    def shares(key):
        weight = 1.0 if slot(key) is None else weights[slot(key)]
        return 1 - weight, weight

    assert_sum(found, models, "ab", shares)


def test_a_difference_is_added_whole_unless_told_otherwise(models, tmp_path):
    found = merge(models, "abc", tmp_path / "out.safetensors", "--add_difference")
    assert_sum(found, models, "abc", lambda key: (1.0, 1.0, -1.0))


def test_block_weights_of_the_blocks_and_a_difference(models, tmp_path):
    weights = [0.04 * number for number in range(23)]
    flags = ("--add_difference", "--ratios=0.5", "--lbws", ",".join(map(str, weights)))
    found = merge(models, "abc", tmp_path / "out.safetensors", *flags)

    def shares(key):
        weight = 1.0
        if key.startswith(UNET):
            kind, number = key.removeprefix(UNET).split(".")[:2]
            first = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13}
            weight = weights[22 if kind == "out" else first[kind] + (int(number) if "block" in kind else 0)]
        return 1.0, 0.5 * weight, -0.5 * weight

    assert_sum(found, models, "abc", shares)


@pytest.mark.parametrize(
    ("count", "named"),
    [
        (12, ["BASE", "IN04", "IN05", "IN07", "IN08", "MID", *[f"OUT{n:02}" for n in range(6)]]),
        (17, ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *[f"OUT{n:02}" for n in range(3, 12)]]),
        (20, ["BASE", *[f"IN{n:02}" for n in range(9)], "MID", *[f"OUT{n:02}" for n in range(9)]]),
        (26, ["BASE", *[f"IN{n:02}" for n in range(12)], "MID", *[f"OUT{n:02}" for n in range(12)]]),
    ],
)
def test_every_length_reaches_the_blocks_that_it_names(count, named):
    weights = [10.0 + number for number in range(count)]
    keys = {f"IN{n:02}": f"{UNET}input_blocks.{n}.0.x" for n in range(9)}
    keys |= {f"OUT{n:02}": f"{UNET}output_blocks.{n}.0.x" for n in range(9)}
    keys |= {"MID": f"{UNET}middle_block.2.x", "BASE": "first_stage_model.x"}
    for name, key in keys.items():
        recipe = Recipe((0.0, 1.0), (tuple(weights),))
        assert recipe.shares_of(key)[1] == (weights[named.index(name)] if name in named else 1.0), name
    assert len(parse_block_weights(json.dumps(weights), MERGE_SLOTS)) == count


def test_tensors_that_a_model_lacks(models, tmp_path, capsys):
    path, tensors = models["b"]
    missing = f"{UNET}out.2.bias"
    fewer = {key: tensor for key, tensor in tensors.items() if key != missing} | {"model_ema.decay": torch.ones(1)}
    with safe_open(path, "pt") as file:
        save_file(fewer, tmp_path / "fewer.safetensors", file.metadata())
    changed = {"a": models["a"], "b": (str(tmp_path / "fewer.safetensors"), tensors)}
    found = merge(changed, "ab", tmp_path / "out.safetensors", "--show_skipped")
    assert_sum(found, models, "ab", lambda key: (1.0, 0.0) if key == missing else (0.5, 0.5))
    printed = capsys.readouterr().out
    assert f"  {missing} (" in printed and "  model_ema.decay (" in printed


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--ratios", "1"], "1 ratios for 2 models"),
        (["--add_difference"], "three models"),
        (["--lbws", "[1,2]"], "has 2 weights"),
        (["--lbws", "[x]"], "not a list of numbers"),
        (["--lbws", *["[" + ",".join(["1"] * 12) + "]"] * 2], "2 lists of block weights for 2 models"),
        (["--ratios", "1e30", "1e30"], "not finite"),
    ],
)
def test_what_does_not_go_together_is_refused(models, tmp_path, flags, what, capsys):
    paths = [models[name][0] for name in "ab"]
    output = ["--output", str(tmp_path / "out.safetensors"), "--saving_precision=fp16"]
    assert main(["--models", *paths, *output, *flags]) == 2
    assert what in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_other_shapes_and_prediction_types_are_refused(models, tmp_path, capsys):
    path, tensors = models["b"]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors | {"v_pred": torch.empty(0)}, tmp_path / "v.safetensors", metadata)
    wide = {key: tensor[:, :1] if key == f"{UNET}out.2.weight" else tensor for key, tensor in tensors.items()}
    save_file({key: tensor.contiguous() for key, tensor in wide.items()}, tmp_path / "wide.safetensors", metadata)
    for name, what in (("v", "predicts v_prediction"), ("wide", "out.2.weight has shape")):
        other = str(tmp_path / f"{name}.safetensors")
        assert main(["--models", models["a"][0], other, "--output", str(tmp_path / "out.safetensors")]) == 2
        assert what in capsys.readouterr().err
