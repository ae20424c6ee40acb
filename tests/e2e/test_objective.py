"""Everything that shapes noise, timesteps and loss at once, through the real script."""

import pytest
import torch
from safetensors.torch import load_file

import sdxl_train_network
from tests.e2e.conftest import arguments, copy_log, log_of

EVERYTHING = [
    "--loss_type=smooth_l1",
    "--huber_c=0.2",
    "--huber_scale=2",
    "--snr_gamma=5",
    "--debiased_estimation_loss",
    "--noise_offset=0.05",
    "--noise_offset_random_strength",
    "--adaptive_noise_scale=0.02",
    "--multires_noise_iterations=4",
    "--input_perturbation=0.1",
    "--timestep_sampling=logit_normal",
    "--timestep_sequence=stratified",
    "--timestep_bias_strategy=later",
    "--timestep_bias_multiplier=2",
    "--min_timestep=100",
    "--dream_training",
]


@pytest.mark.e2e
def test_one_step_and_two_resumed_equal_three_with_every_option(train):
    flags = [
        *EVERYTHING,
        "--max_train_steps=3",
        "--gradient_accumulation_steps=2",
        "--network_dropout=0.1",
        "--save_state",
        "--network_train_unet_only",
    ]
    whole = train("whole", *flags, "--save_every_n_steps=1")
    copy_log(whole, whole.parent / "resumed")
    resumed = train("resumed", *flags, f"--resume={whole / 'net-step00000001-state'}")
    first, second = load_file(whole / "net.safetensors"), load_file(resumed / "net.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(value.abs().max() > 0 for name, value in first.items() if "lora_up" in name)
    assert log_of(whole) == log_of(resumed)


@pytest.mark.e2e
def test_what_has_no_meaning_for_the_model_is_refused_before_images_are_encoded(pictures, tmp_path, capsys):
    flags = ["--scale_v_pred_loss_like_noise_pred", "--max_train_steps=1", "--cache_latents_to_disk"]
    assert sdxl_train_network.main(arguments(pictures, tmp_path / "out", *flags)) == 2
    assert "scale_v_pred_loss_like_noise_pred needs a model that predicts v" in capsys.readouterr().err
    assert not list(pictures.rglob("*.npz"))
