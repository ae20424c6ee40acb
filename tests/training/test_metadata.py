"""The ss_* strings of a network file."""

import torch

from library.config.cli import make_config
from library.training import metadata as meta

# model_files.md section 9, without what only exists with a VAE file, network_args or a data set.
DOCUMENTED = frozenset(
    (
        "session_id",
        "training_started_at",
        "output_name",
        "learning_rate",
        "text_encoder_lr",
        "unet_lr",
        "num_train_images",
        "num_validation_images",
        "num_reg_images",
        "num_batches_per_epoch",
        "num_epochs",
        "gradient_checkpointing",
        "gradient_accumulation_steps",
        "max_train_steps",
        "lr_warmup_steps",
        "lr_scheduler",
        "network_module",
        "network_dim",
        "network_alpha",
        "network_dropout",
        "mixed_precision",
        "full_fp16",
        "v2",
        "base_model_version",
        "clip_skip",
        "max_token_length",
        "cache_latents",
        "seed",
        "lowram",
        "noise_offset",
        "multires_noise_iterations",
        "multires_noise_discount",
        "adaptive_noise_scale",
        "zero_terminal_snr",
        "training_comment",
        "optimizer",
        "max_grad_norm",
        "caption_dropout_rate",
        "caption_dropout_every_n_epochs",
        "caption_tag_dropout_rate",
        "face_crop_aug_range",
        "prior_loss_weight",
        "min_snr_gamma",
        "scale_weight_norms",
        "ip_noise_gamma",
        "debiased_estimation",
        "noise_offset_random_strength",
        "ip_noise_gamma_random_strength",
        "loss_type",
        "huber_schedule",
        "huber_scale",
        "huber_c",
        "fp8_base",
        "fp8_base_unet",
        "validation_seed",
        "validation_split",
        "max_validation_steps",
        "validate_every_n_epochs",
        "validate_every_n_steps",
        "resize_interpolation",
    )
)


def _metadata(tmp_path, **options):
    (tmp_path / "1_a").mkdir(exist_ok=True)
    cfg = make_config(
        "sdxl_train_network",
        pretrained_model_name_or_path="tiny",
        train_data_dir=str(tmp_path),
        output_dir=str(tmp_path),
        resolution=64,
        network_module="networks.lora",
        **options,
    )
    run = meta.RunDescription(
        session_id="1",
        started_at=1.5,
        seed=7,
        optimizer="torch.optim.adamw.AdamW(weight_decay=0.1)",
        num_train_images=3,
        num_reg_images=0,
        num_validation_images=0,
        num_batches_per_epoch=2,
        num_epochs=4,
        max_train_steps=8,
    )
    return meta.network_metadata(cfg.flat(), run, {"ss_datasets": "[]"}, {"ss_network_dim": "16"})


def test_every_documented_key_is_there_as_a_string(tmp_path):
    found = _metadata(tmp_path)
    assert {f"ss_{name}" for name in DOCUMENTED} <= found.keys()
    assert all(isinstance(value, str) for value in found.values())


def test_values_are_written_as_sd_scripts_does(tmp_path):
    found = _metadata(tmp_path, text_encoder_lr=[1e-5], gradient_checkpointing=True, unet_lr=1e-4)
    assert found["ss_text_encoder_lr"] == "1e-05"
    assert found["ss_unet_lr"] == "0.0001"
    assert found["ss_gradient_checkpointing"] == "True"
    assert found["ss_clip_skip"] == "None"
    assert found["ss_max_token_length"] == "None"
    assert _metadata(tmp_path, max_token_length=150)["ss_max_token_length"] == "150"
    assert _metadata(tmp_path)["ss_text_encoder_lr"] == "None"
    assert found["ss_face_crop_aug_range"] == "None"
    assert _metadata(tmp_path, face_crop_aug_range="2,4")["ss_face_crop_aug_range"] == "(2.0, 4.0)"


def test_what_shaped_noise_and_loss_is_recorded(tmp_path):
    found = _metadata(
        tmp_path,
        loss_type="huber",
        huber_c=0.2,
        huber_schedule="constant",
        snr_gamma=5.0,
        debiased_estimation_loss=True,
        noise_offset=0.05,
        noise_offset_random_strength=True,
        adaptive_noise_scale=0.01,
        multires_noise_iterations=6,
        input_perturbation=0.1,
    )
    expected = {
        "loss_type": "huber",
        "huber_c": "0.2",
        "huber_scale": "1.0",
        "huber_schedule": "constant",
        "min_snr_gamma": "5.0",
        "debiased_estimation": "True",
        "noise_offset": "0.05",
        "noise_offset_random_strength": "True",
        "adaptive_noise_scale": "0.01",
        "multires_noise_iterations": "6",
        "multires_noise_discount": "0.3",
        "ip_noise_gamma": "0.1",
        "ip_noise_gamma_random_strength": "False",
    }
    assert {name: found[f"ss_{name}"] for name in expected} == expected
    plain = _metadata(tmp_path)
    assert plain["ss_min_snr_gamma"] == plain["ss_noise_offset"] == "None"
    assert plain["ss_debiased_estimation"] == "False"


def test_what_the_network_says_wins_over_the_settings(tmp_path):
    assert _metadata(tmp_path, network_dim=4)["ss_network_dim"] == "16"


def test_minimum_is_what_a_loader_needs(tmp_path):
    kept = meta.at_save(_metadata(tmp_path), finished_at=2.0, steps=8, epoch=4, minimum=True)
    assert set(kept) == set(meta.MINIMUM) - {"ss_network_args"}
    whole = meta.at_save(_metadata(tmp_path), finished_at=2.0, steps=8, epoch=4, minimum=False)
    assert (whole["ss_steps"], whole["ss_epoch"], whole["ss_training_finished_at"]) == ("8", "4", "2.0")


def test_the_optimizer_is_recorded_with_its_arguments():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    assert meta.optimizer_text(optimizer, {"weight_decay": 0.1}) == "torch.optim.adamw.AdamW(weight_decay=0.1)"
