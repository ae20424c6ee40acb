"""Training from several cached wordings of each caption: kept on disk, reused, and exact on resume."""

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import copy_log, log_of


@pytest.mark.e2e
def test_wordings_on_disk_are_reused_and_a_resumed_run_draws_the_same_ones(train, pictures, capfd):
    flags = [
        "--max_train_steps=8",
        "--network_train_unet_only",
        "--shuffle_caption",
        "--caption_dropout_rate=0.2",
        "--cache_text_encoder_outputs_to_disk",
        "--cache_latents",
        "--save_state",
    ]
    variants = "--text_cache_variants=3"
    whole = train("whole", *flags, variants, "--save_every_n_steps=3")
    assert "text encoder outputs: built 7, reused 0, stale 0" in capfd.readouterr().err
    files = {path.name: path.stat().st_mtime_ns for path in pictures.rglob("*_te_outputs.npz")}
    assert len(files) == 7
    copy_log(whole, whole.parent / "resumed")
    resumed = train("resumed", *flags, variants, f"--resume={whole / 'net-step00000003-state'}")
    assert "text encoder outputs: built 0, reused 7, stale 0" in capfd.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in pictures.rglob("*_te_outputs.npz")} == files
    first, second = load_file(whole / "net.safetensors"), load_file(resumed / "net.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert log_of(whole) == log_of(resumed)
    in_memory = [flag for flag in flags if "to_disk" not in flag] + ["--cache_text_encoder_outputs"]
    for one, two in zip(log_of(whole), log_of(train("memory", *in_memory, variants)), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
