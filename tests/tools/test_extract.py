"""A LoRA extracted from base + known change is that change; of a full change it is the best of its rank."""

import types

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from library.inference.lora_tools import extract
from tests.tools.reference import deltas_of, merged, modules_of, places, relative
from tools import extract_lora


def run(base, tuned, out, *more):
    return extract_lora.main(["--model_org", str(base), "--model_tuned", str(tuned), "--save_to", str(out), *more])


@pytest.fixture(scope="module")
def tuned(base, first, folder):
    """The base model with a change of rank 4 (2 in convolutions)."""
    path = folder / "tuned.safetensors"
    with safe_open(base, "np") as file:
        header = file.metadata()
    save_file({k: v.astype(np.float32) for k, v in merged(base, [(first, 1.0, {})]).items()}, path, header)
    return path


@pytest.fixture(scope="module")
def recovered(base, tuned, folder):
    """The change extracted at its own ranks, unclamped."""
    out = folder / "recovered.safetensors"
    assert run(base, tuned, out, "--dim", "4", "--conv_dim", "2", "--clamp_quantile", "1") == 0
    return out


def test_a_low_rank_change_is_recovered(recovered, first):
    found, wanted = deltas_of(recovered), deltas_of(first)
    assert found.keys() == wanted.keys()
    assert max(relative(found[name], wanted[name]) for name in wanted) < 1e-3
    modules = modules_of(recovered)
    assert all(float(module["alpha"]) == len(module["down"]) for module in modules.values())


def test_the_randomised_method_recovers_it_too(base, tuned, first, tmp_path):
    out = tmp_path / "out.safetensors"
    run(base, tuned, out, "--dim", "4", "--clamp_quantile", "1", "--svd", "randomized")
    found, wanted = deltas_of(out), deltas_of(first)
    assert max(relative(found[name], wanted[name]) for name in found) < 1e-3


def test_a_smaller_rank_is_the_best_approximation_and_the_error_is_printed(base, tuned, first, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    run(base, tuned, out, "--dim", "2", "--clamp_quantile", "1")
    found = deltas_of(out)
    exact = {name: delta for name, delta in deltas_of(first).items() if name in found}
    assert len(exact) == 36 + 192  # without conv_dim only what training adapts without it
    left_out = {name: np.sum(scipy.linalg.svdvals(delta)[2:] ** 2) for name, delta in exact.items()}
    for name, delta in exact.items():
        assert np.sum((found[name] - delta) ** 2) == pytest.approx(left_out[name], rel=1e-3)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("U-Net"))
    unet = [name for name in exact if "unet" in name]
    share = np.sqrt(sum(left_out[n] for n in unet) / sum(np.sum(exact[n] ** 2) for n in unet))
    assert float(line.split()[3]) == pytest.approx(share, rel=2e-3)


def test_values_are_clamped_at_the_quantile_of_both_factors(base, tuned, recovered, tmp_path, capsys):
    run(base, tuned, tmp_path / "cut.safetensors", "--dim", "4", "--clamp_quantile", "0.9")
    free, cut = modules_of(recovered), modules_of(tmp_path / "cut.safetensors")
    for name in ("lora_unet_middle_block_1_proj_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1"):
        values = np.concatenate([free[name]["up"].ravel(), free[name]["down"].ravel()])
        limit = np.quantile(values, 0.9)
        for kind in ("up", "down"):
            assert np.allclose(cut[name][kind], np.clip(free[name][kind], -limit, limit), atol=1e-6)
    assert "0.9 quantile" in capsys.readouterr().out


def test_models_can_be_rounded_before_they_are_compared(base, tuned, tmp_path):
    out = tmp_path / "out.safetensors"
    run(base, tuned, out, "--dim", "80", "--clamp_quantile", "1", "--load_precision", "bf16")
    name = "lora_unet_middle_block_1_proj_in"
    before, after = (torch.from_numpy(load_file(path)[places(load_file(path))[name][0]]) for path in (base, tuned))
    rounded = after.bfloat16().float() - before.bfloat16().float()
    found = deltas_of(out)[name]
    assert relative(found, rounded.numpy()) < 1e-4 < 1e-3 < relative(found, (after - before).numpy())


def test_text_encoders_that_hardly_changed_are_left_out(base, tuned, first, tmp_path):
    largest = max(np.abs(delta).max() for name, delta in deltas_of(first).items() if "_te" in name)
    for factor, present in ((0.9, True), (1.1, False)):
        out = tmp_path / f"{factor}.safetensors"
        run(base, tuned, out, "--dim", "1", "--min_diff", str(largest * factor))
        assert any("lora_te" in name for name in modules_of(out)) == present
        assert any("lora_unet" in name for name in modules_of(out))


def test_a_weight_that_shrank_counts_as_one_that_grew():
    text, unet = (types.SimpleNamespace(part=part) for part in ("te1", "unet"))
    how = extract.Extraction(dim=1, min_diff=0.5)
    for change, kept in ((-1.0, [text, unet]), (1.0, [text, unet]), (-0.5, [unet])):
        pair = types.SimpleNamespace(how=how, delta=lambda target, change=change: torch.tensor([0.1, change]))
        assert extract._without_equal_text(pair, [text, unet]) == kept


def test_metadata(base, tuned, tmp_path):
    out = tmp_path / "change.safetensors"
    run(base, tuned, out, "--dim", "4", "--conv_dim", "2", "--save_precision", "fp16", "--v_parameterization")
    with safe_open(out, "pt") as file:
        found = file.metadata()
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "4.0")
    assert found["ss_network_args"] == '{"conv_dim": "2", "conv_alpha": "2.0"}'
    assert found["modelspec.prediction_type"] == "v" and found["modelspec.title"] == "change"
    assert found["ss_training_comment"] == "extracted from tuned - base"
    assert {str(v.dtype) for k, v in load_file(out).items() if "lora_" in k.partition(".")[2]} == {"float16"}


def test_equal_models_and_models_of_other_sizes_are_refused(base, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert run(base, base, out, "--dim", "2") == 2
    assert "do not differ" in capsys.readouterr().err
    tensors = load_file(base)
    with safe_open(base, "np") as file:
        header = file.metadata()
    start = "model.diffusion_model.input_blocks.7.1.transformer_blocks.1."
    fewer = {key: value for key, value in tensors.items() if not key.startswith(start)}
    save_file(fewer, tmp_path / "other.safetensors", header)
    assert run(base, tmp_path / "other.safetensors", out, "--dim", "2") == 2
    assert not out.exists()


def test_a_tuned_model_with_nan_is_refused(base, tmp_path, capsys):
    tensors = load_file(base)
    key = places(tensors)["lora_unet_middle_block_1_proj_in"][0]
    tensors[key] = tensors[key] * np.float32("nan")
    with safe_open(base, "np") as file:
        save_file(tensors, tmp_path / "nan.safetensors", file.metadata())
    assert run(base, tmp_path / "nan.safetensors", tmp_path / "out.safetensors") == 2
    assert "lora_unet_middle_block_1_proj_in holds NaN" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]
