"""lycoris.kohya through the real script: it resumes to the bit, and two processes are one with twice the batch."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sdxl_train_network
from tests.e2e.conftest import arguments, copy_log, full_arguments, log_of
from tests.e2e.test_resume import state_tensors
from tests.ranks import two_ranks

pytest.importorskip("lycoris.kohya")
NETWORK = ["--network_module=lycoris.kohya", "--network_dim=4", "--network_alpha=2"]
LOKR = [*NETWORK, "--network_args", "algo=lokr", "factor=4", "rank_dropout=0.2", "conv_di=4"]
# Plain steps: what a process computes shows in the weights as it is, where Adam would turn a rounding into a step.
SGD = ["--optimizer_type=torch.optim.SGD", "--learning_rate=0.05", "--max_train_steps=2", "--max_grad_norm=0"]


@pytest.mark.e2e
def test_a_third_party_network_resumes_to_the_bit_and_its_file_is_sd_scripts(train, caplog):
    flags = ["--max_train_steps=4", "--save_state", *LOKR]
    whole = train("whole", *flags, "--save_every_n_steps=2")
    assert "lycoris.kohya does not read conv_di, so it has no effect; did you mean conv_dim?" in caplog.text
    copy_log(whole, whole.parent / "resumed")
    resumed = train("resumed", *flags, f"--resume={whole / 'net-step00000002-state'}")
    expected, got = state_tensors(whole / "net-state"), state_tensors(resumed / "net-state")
    assert expected.keys() == got.keys() and len(expected) > 1000
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert log_of(whole) == log_of(resumed)
    with safe_open(whole / "net.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lokr_w1" in names
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1.lokr_w1" in names
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == ("lycoris.kohya", "4")
    assert json.loads(metadata["ss_network_args"])["algo"] == "lokr" and len(metadata["sshs_model_hash"]) == 64


def _same_up_to_the_order_of_sums(one, two, start):
    """Files of weights: equal to a small part of what training changed."""
    expected, got = load_file(one), load_file(two)
    assert expected.keys() == got.keys()
    change = max(float((expected[name].double() - start[name].double()).abs().max()) for name in expected)
    difference = max(float((expected[name].double() - got[name].double()).abs().max()) for name in expected)
    assert change > 1e-6 and difference < 1e-3 * change, (change, difference)


def _same_losses(one, two):
    for first, second in zip(log_of(one), log_of(two), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)


@pytest.mark.e2e
def test_two_processes_train_a_third_party_network_as_one(train, pictures, tmp_path):
    flags = [*NETWORK, "--network_args", "algo=loha"]
    one = train("one", *SGD, *flags, "--train_batch_size=4", "--save_every_n_steps=1")
    two = tmp_path / "two"
    two_ranks("sdxl_train_network", arguments(pictures, two, *SGD, *flags, "--train_batch_size=2"), tmp_path)
    _same_losses(one, two)
    start = load_file(one / "net-step00000001.safetensors")
    _same_up_to_the_order_of_sums(one / "net.safetensors", two / "net.safetensors", start)


@pytest.mark.e2e
def test_two_processes_fine_tune_the_model_as_one(fine_tune, pictures, tmp_path):
    flags = [*SGD, "--train_text_encoder", "--save_every_n_steps=1"]
    one = fine_tune("one", *flags, "--train_batch_size=4")
    two = tmp_path / "two"
    two_ranks("sdxl_train", full_arguments(pictures, two, *flags, "--train_batch_size=2"), tmp_path)
    _same_losses(one, two)
    start = load_file(one / "net-step00000001.safetensors")
    _same_up_to_the_order_of_sums(one / "net.safetensors", two / "net.safetensors", start)


@pytest.mark.e2e
def test_modules_that_are_missing_or_make_nothing_are_explained(pictures, tmp_path, capsys, monkeypatch):
    argv = arguments(pictures, tmp_path / "out")
    assert sdxl_train_network.main([*argv, "--network_module=not_there.kohya"]) == 2
    assert "not_there" in capsys.readouterr().err
    from library.config import check_files

    monkeypatch.setattr(check_files, "find_spec", lambda name: None)
    assert sdxl_train_network.main([*argv, "--network_module=lycoris.kohya"]) == 2
    assert "pip install lycoris-lora" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("lycoris.kohya.create_network", lambda *args, **kwargs: None)
    assert sdxl_train_network.main([*argv, "--network_module=lycoris.kohya"]) == 2
    assert "lycoris.kohya made no network" in capsys.readouterr().err
