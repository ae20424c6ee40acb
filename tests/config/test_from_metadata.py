"""A run's configuration out of a network's metadata: sd-scripts' own files, ours, and what cannot be mapped."""

import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdxl_train_network
from library.config.cli import make_config, parse
from library.config.dataset_file import dataset_specs
from library.config.from_metadata import rebuild, split_arguments
from library.errors import UserError
from library.training.metadata import RunDescription, network_metadata

# As sd-scripts 0.9 writes them, by hand (model_files.md section 9).
SD_SCRIPTS = {
    "ss_session_id": "123", "ss_training_started_at": "1700000000.5", "ss_output_name": "cat",
    "ss_learning_rate": "0.0001", "ss_text_encoder_lr": "[5e-05, 1e-05]", "ss_unet_lr": "0.0002",
    "ss_num_train_images": "50", "ss_num_reg_images": "0", "ss_num_batches_per_epoch": "25", "ss_num_epochs": "8",
    "ss_gradient_checkpointing": "True", "ss_gradient_accumulation_steps": "2", "ss_max_train_steps": "1600",
    "ss_lr_warmup_steps": "100", "ss_lr_scheduler": "cosine", "ss_network_module": "networks.lora",
    "ss_network_dim": "16", "ss_network_alpha": "8.0", "ss_network_dropout": "0.1", "ss_mixed_precision": "bf16",
    "ss_full_fp16": "False", "ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0", "ss_clip_skip": "None",
    "ss_max_token_length": "225", "ss_cache_latents": "True", "ss_seed": "42", "ss_lowram": "True",
    "ss_noise_offset": "0.0357", "ss_multires_noise_iterations": "None", "ss_adaptive_noise_scale": "None",
    "ss_zero_terminal_snr": "False", "ss_training_comment": "a comment",
    "ss_sd_scripts_commit_hash": "abc",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.05,betas=(0.9, 0.99))",
    "ss_max_grad_norm": "1.0", "ss_caption_dropout_rate": "0.0", "ss_caption_dropout_every_n_epochs": "0",
    "ss_caption_tag_dropout_rate": "0.0", "ss_face_crop_aug_range": "None", "ss_prior_loss_weight": "1.0",
    "ss_min_snr_gamma": "5.0", "ss_scale_weight_norms": "None", "ss_ip_noise_gamma": "None",
    "ss_debiased_estimation": "False", "ss_loss_type": "l2", "ss_huber_schedule": "snr", "ss_huber_c": "0.1",
    "ss_network_args": json.dumps({"conv_dim": "4", "conv_alpha": "1", "dropout": 0.1}),
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors", "ss_sd_model_hash": "be9edd61",
    "ss_new_sd_model_hash": "31e35c80",
    "ss_steps": "1600", "ss_epoch": "8", "ss_training_finished_at": "1700009999.5", "ss_something_new": "7",
    "sshs_model_hash": "aa", "modelspec.title": "cat", "modelspec.author": "me",
    "modelspec.prediction_type": "epsilon",
}  # fmt: skip
SINGLE = {
    "ss_batch_size_per_device": "2", "ss_total_batch_size": "4", "ss_resolution": "(1024, 768)",
    "ss_color_aug": "False", "ss_flip_aug": "True", "ss_random_crop": "False", "ss_shuffle_caption": "True",
    "ss_enable_bucket": "True", "ss_bucket_no_upscale": "False", "ss_min_bucket_reso": "256",
    "ss_max_bucket_reso": "2048", "ss_keep_tokens": "1", "ss_tag_frequency": json.dumps({"10_cat": {"cat": 5}}),
    "ss_dataset_dirs": json.dumps({"10_cat": {"n_repeats": 10, "img_count": 5}}), "ss_reg_dataset_dirs": "{}",
    "ss_bucket_info": "null",
}  # fmt: skip
DATASETS = [
    {
        "is_dreambooth": True, "batch_size_per_device": 3, "num_train_images": 50, "num_reg_images": 5,
        "resolution": [832, 1216], "enable_bucket": True, "min_bucket_reso": 512, "max_bucket_reso": 1536,
        "tag_frequency": {}, "bucket_info": {"buckets": {}}, "resize_interpolation": None,
        "subsets": [
            {
                "img_count": 5, "num_repeats": 10, "color_aug": False, "flip_aug": True, "random_crop": False,
                "shuffle_caption": True, "keep_tokens": 2, "keep_tokens_separator": "|||", "secondary_separator": None,
                "enable_wildcard": False, "caption_prefix": "by me, ", "caption_suffix": None,
                "image_dir": "cats", "class_tokens": "a zxq cat", "is_reg": False, "new_key": 3,
            },
            {"img_count": 5, "num_repeats": 1, "image_dir": "others", "class_tokens": "cat", "is_reg": True},
        ],
    }
]  # fmt: skip


def rebuilt(metadata):
    return rebuild(metadata, dataset_file="run-dataset.toml", where="net.safetensors")


def flat(text):
    return {key: value for section in tomllib.loads(text).values() for key, value in section.items()}


def test_a_file_of_sd_scripts_with_one_data_set():
    found = rebuilt(SD_SCRIPTS | SINGLE)
    assert found.dataset is None
    assert flat(found.config) == {
        "pretrained_model_name_or_path": "sd_xl_base_1.0.safetensors", "max_token_length": 225,
        "network_module": "networks.lora", "network_dim": 16, "network_alpha": 8.0, "network_dropout": 0.1,
        "network_args": ["conv_dim=4", "conv_alpha=1"], "unet_lr": 0.0002, "text_encoder_lr": [5e-05, 1e-05],
        "learning_rate": 0.0001, "optimizer_type": "AdamW8bit",
        "optimizer_args": ["weight_decay=0.05", "betas=(0.9, 0.99)"], "lr_scheduler": "cosine", "lr_warmup_steps": 100,
        "gradient_checkpointing": True, "gradient_accumulation_steps": 2,
        "mixed_precision": "bf16", "seed": 42, "cache_latents": True, "noise_offset": 0.0357, "min_snr_gamma": 5.0,
        "training_comment": "a comment", "output_name": "cat", "metadata_author": "me",
        "train_data_dir": "folder-of-10_cat", "resolution": "1024,768", "train_batch_size": 2, "flip_aug": True,
        "shuffle_caption": True, "enable_bucket": True, "max_bucket_reso": 2048, "keep_tokens": 1,
    } | ({"min_bucket_reso": 256} if "min_bucket_reso" in flat(found.config) else {})  # fmt: skip
    notes = "\n".join(found.notes)
    assert "lowram = True" in notes and "something_new = 7" in notes and "10_cat" in notes
    assert "loss_type" not in notes and "huber" not in notes


def test_it_parses_and_only_paths_are_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(rebuilt(SD_SCRIPTS | SINGLE).config)
    with pytest.raises(UserError) as caught:
        parse("sdxl_train_network", ["--config_file=run.toml", "--output_dir=out"])
    assert len(caught.value.problems) <= 3
    for problem in caught.value.problems:
        assert "sd_xl_base_1.0" in str(problem) or "folder-of-10_cat" in str(problem), problem
    (tmp_path / "images" / "10_cat").mkdir(parents=True)
    paths = ["--pretrained_model_name_or_path=tiny", "--train_data_dir=images", "--no_color_aug", "--output_dir=out"]
    text = (tmp_path / "run.toml").read_text().replace("shuffle_caption = true\n", "")
    (tmp_path / "run.toml").write_text(text)
    cfg = parse("sdxl_train_network", ["--config_file=run.toml", *paths])
    assert cfg.network.network_kwargs()["conv_dim"] == "4"
    assert cfg.optim.optimizer_kwargs() == {"weight_decay": 0.05, "betas": (0.9, 0.99)}
    (spec,) = dataset_specs(cfg)
    assert (spec.resolution, spec.batch_size) == ((1024, 768), 2)


def test_a_file_of_sd_scripts_with_a_dataset_file(tmp_path, monkeypatch):
    found = rebuilt(SD_SCRIPTS | {"ss_datasets": json.dumps(DATASETS), "ss_dataset_dirs": "{}"})
    assert flat(found.config)["dataset_config"] == "run-dataset.toml"
    assert "train_data_dir" not in found.config
    assert any("new_key = 3" in note for note in found.notes)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(found.config)
    (tmp_path / "run-dataset.toml").write_text(found.dataset)
    for name in ("cats", "others"):
        (tmp_path / name).mkdir()
    cfg = parse(
        "sdxl_train_network", ["--config_file=run.toml", "--pretrained_model_name_or_path=tiny", "--output_dir=out"]
    )
    (spec,) = dataset_specs(cfg)
    assert (spec.batch_size, spec.resolution, spec.min_bucket_reso, spec.max_bucket_reso) == (3, (832, 1216), 512, 1536)
    cats, others = spec.subsets
    assert (cats.num_repeats, cats.keep_tokens, cats.keep_tokens_separator, cats.flip_aug) == (10, 2, "|||", True)
    assert (cats.class_tokens, cats.caption_prefix, cats.is_reg) == ("a zxq cat", "by me, ", False)
    assert others.is_reg and others.class_tokens == "cat" and not others.flip_aug


def test_our_own_metadata_come_back(complete):
    given = {
        "learning_rate": 3e-4, "optimizer_type": "Lion", "network_dim": 8, "network_alpha": 2.0, "unet_lr": 1e-4,
        "max_train_steps": 77, "min_snr_gamma": 3.0, "seed": 5, "loss_type": "huber", "noise_offset": 0.05,
        "gradient_checkpointing": True, "mixed_precision": "bf16", "text_encoder_lr": [1e-5],
    }  # fmt: skip
    cfg = make_config("sdxl_train_network", **complete, **given)
    run = RunDescription("1", 0.0, 5, "lion_pytorch.lion_pytorch.Lion", 1, 0, 0, 1, 1, 77)
    metadata = network_metadata(cfg.flat(), run, {"ss_resolution": "(512, 512)"}, {})
    found = flat(rebuilt(metadata).config)
    assert {name: found[name] for name in given} == given
    assert found["resolution"] in ("512,512", 512)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"ss_network_dim": "Dynamic"}, "network_dim = Dynamic"),
        ({"ss_lr_scheduler": "of_my_own"}, "of_my_own"),
        ({"ss_network_args": "{"}, "network_args"),
        ({"ss_datasets": "[1]"}, "datasets is no JSON list"),
        ({"ss_optimizer": "torch.optim.AdamW(eps)"}, "eps of the optimizer"),
        ({"ss_text_encoder_lr": "many"}, "text_encoder_lr = many"),
    ],
)
def test_what_cannot_be_mapped_is_listed(change, what):
    found = rebuilt(SD_SCRIPTS | SINGLE | change)
    assert any(what in note for note in found.notes), found.notes
    assert what in found.config  # as a comment at its head
    tomllib.loads(found.config)


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        ({}, "nothing about its training"),
        ({"modelspec.title": "x"}, "nothing about its training"),
        (SD_SCRIPTS | {"ss_base_model_version": "sd_v1"}, "sd_v1, not on SDXL"),
        (SD_SCRIPTS | {"ss_v2": "True"}, "not on SDXL"),
    ],
)
def test_other_files_are_refused(metadata, what):
    with pytest.raises(UserError, match=what):
        rebuilt(metadata)


def test_v_prediction_is_found_and_an_optimizer_of_elsewhere_keeps_its_path():
    found = flat(rebuilt(SD_SCRIPTS | {"modelspec.prediction_type": "v", "ss_optimizer": "my.module.Thing"}).config)
    assert found["v_parameterization"] is True
    assert found["optimizer_type"] == "my.module.Thing"


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.tuples(st.floats(0, 1), st.integers(0, 9))))
def test_arguments_are_split_where_they_were_joined(arguments):
    pairs = [f"{key}={value}" for key, value in arguments.items()]
    assert split_arguments(",".join(pairs)) == pairs


@given(st.dictionaries(st.sampled_from(sorted(SD_SCRIPTS | SINGLE)), st.text(max_size=20)))
def test_no_text_breaks_it(change):
    metadata = SD_SCRIPTS | SINGLE | change | {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
    tomllib.loads(rebuilt(metadata).config)


def _write(path, metadata):
    header = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def test_the_entry_point_writes_both_files_and_never_over_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lora = _write(tmp_path / "net.safetensors", SD_SCRIPTS | {"ss_datasets": json.dumps(DATASETS)})
    words = [f"--config_from_lora={lora}", "--config_file", "again"]
    assert sdxl_train_network.main(words) == 0
    assert flat((tmp_path / "again.toml").read_text())["dataset_config"] == "again-dataset.toml"
    assert "[[datasets]]" in (tmp_path / "again-dataset.toml").read_text()
    assert "note: not mapped: lowram" in capsys.readouterr().out
    assert sdxl_train_network.main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert sdxl_train_network.main([f"--config_from_lora={lora}"]) == 0
    assert "[[datasets.subsets]]" in capsys.readouterr().out
    assert sdxl_train_network.main([f"--config_from_lora={lora}", "--seed=3"]) == 2
    assert "cannot stand beside" in capsys.readouterr().err
    assert sdxl_train_network.main(["--config_from_lora", str(tmp_path / "none.safetensors")]) == 2
    assert "does not exist" in capsys.readouterr().err
