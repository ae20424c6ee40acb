"""Kinds of networks through the real scripts: resume, merging into the base, merged and live pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sdxl_gen_img
from tests.e2e.conftest import log_of


@pytest.mark.e2e
def test_a_dylora_resumes_exactly_with_its_random_ranks_and_limited_norms(train):
    flags = [
        "--network_module=networks.dylora",
        "--network_args",
        "unit=2",
        "loraplus_lr_ratio=4",
        "--scale_weight_norms=0.01",
        "--save_state",
    ]
    whole = train("whole", *flags, "--max_train_steps=5", "--save_every_n_steps=3")
    resumed = train("resumed", *flags, "--max_train_steps=5", f"--resume={whole / 'net-step00000003-state'}")
    first, second = (load_file(folder / "net.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    last = log_of(whole)[-1]
    assert last["max_norm/keys_scaled"] > 0
    assert last["max_norm/max_key_norm"] <= 0.01 * 1.001
    assert {"lr/unet", "lr/unet plus", "lr/textencoder1 plus"} <= last.keys()


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["dora", "oft"])
def test_merged_and_live_networks_draw_the_same(train, tmp_path, kind):
    rate = "--network_alpha=0.01" if kind == "oft" else "--network_alpha=4"
    output = train("out", f"--network_module=networks.{kind}", "--network_dim=4", rate, "--max_train_steps=3")
    file = output / "net.safetensors"
    network = [f"--network_module=networks.{kind}", f"--network_weights={file}"]
    drawn = {}
    for name, flags in {"base": [], "live": network, "merged": [*network, "--network_merge"]}.items():
        folder = tmp_path / name
        arguments = [
            "--ckpt=tiny",
            "--prompt=a red circle --d 1",
            f"--outdir={folder}",
            "--steps=4",
            "--W=64",
            "--H=64",
        ]
        assert sdxl_gen_img.main([*arguments, *flags]) == 0
        (picture,) = folder.glob("*.png")
        drawn[name] = np.asarray(Image.open(picture)).astype(int)
    assert np.abs(drawn["live"] - drawn["base"]).max() > 8
    assert np.abs(drawn["live"] - drawn["merged"]).max() <= 1


@pytest.mark.e2e
def test_base_weights_are_what_training_starts_on(train):
    first = train("first", "--max_train_steps=2")
    merged = [f"--base_weights={first / 'net.safetensors'}", "--base_weights_multiplier=2.0"]
    plain, moved = (train(name, "--max_train_steps=1", *more) for name, more in (("plain", []), ("moved", merged)))
    assert log_of(plain)[0]["loss"] != log_of(moved)[0]["loss"]
