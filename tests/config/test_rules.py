"""Rules between options: each fires where it should, and only there."""

import pytest

from library.config import validate
from library.config.cli import make_config, parse
from library.errors import UserError

TRAINER_CASES = [
    ("model_is_named", {"pretrained_model_name_or_path": ""}, "pretrained_model_name_or_path is missing"),
    ("data_is_named", {"train_data_dir": ""}, "there is no data"),
    ("latents_are_cached", {"cache_latents_moments": True}, "cache_latents_moments needs cache_latents"),
    ("latents_are_cached", {"cache_in_background": True}, "cache_in_background needs cache_latents"),
    ("cached_text_is_not_trained", {"cache_text_encoder_outputs": True}, "needs network_train_unet_only"),
    ("cached_text_is_not_trained", {"cache_text_encoder_outputs_to_disk": True}, "needs network_train_unet_only"),
    ("caches_are_on_disk", {"cache_store": "packed"}, "cache_store cannot act: nothing is cached on disk"),
    (
        "variants_are_cached",
        {"text_cache_variants": 4, "shuffle_caption": True},
        "acts with cache_text_encoder_outputs",
    ),
    ("timesteps_are_left", {"min_timestep": 500, "max_timestep": 500}, "no timestep is left"),
    (
        "metadata_has_no_regularisation",
        {"in_json": __file__, "reg_data_dir": "reg"},
        "in_json and reg_data_dir cannot be used together",
    ),
    ("one_optimizer", {"use_8bit_adam": True, "optimizer_type": "AdamW"}, "name two optimizers"),
    ("constant_has_no_warmup", {"lr_warmup_steps": 10}, "constant has no warm-up"),
    ("piecewise_needs_rules", {"lr_scheduler": "piecewise_constant"}, "needs step_rules"),
    ("schedulers_that_are_not_there", {"lr_scheduler_min_lr_ratio": 0.1}, "not supported yet"),
    ("schedulers_that_are_not_there", {"lr_decay_steps": 10}, "not supported yet"),
    (
        "something_is_trained",
        {"network_train_unet_only": True, "network_train_text_encoder_only": True},
        "leave nothing to train",
    ),
    ("ranks_come_from_a_file", {"dim_from_weights": True}, "needs network_weights"),
    ("networks_are_files", {"save_model_as": "diffusers"}, "a network is saved as a single file"),
    ("output_is_named", {"output_dir": ""}, "output_dir is missing"),
    ("samples_need_prompts", {"sample_every_n_steps": 5}, "sample_every_n_steps needs sample_prompts"),
    (
        "samples_need_prompts",
        {"sample_at_first": True, "sample_every_n_epochs": 5},
        "sample_every_n_epochs and sample_at_first need sample_prompts",
    ),
]
FULL_CASES = [
    (
        "cached_text_encoders_stay",
        {"cache_text_encoder_outputs": True, "train_text_encoder": True},
        "exclude each other",
    ),
    ("something_has_a_rate", {"learning_rate": 0.0}, "nothing would train"),
    ("something_has_a_rate", {"block_lr": [0.0] * 23}, "nothing would train"),
    (
        "something_has_a_rate",
        {"learning_rate": 0.0, "train_text_encoder": True, "learning_rate_te1": 0.0, "learning_rate_te2": 0.0},
        "nothing would train",
    ),
]
GENERATOR_CASES = [
    ("checkpoint_is_named", {"ckpt": ""}, "ckpt is missing"),
    ("prompt_is_there", {"prompt": None}, "there is no prompt"),
    ("one_precision", {"fp16": True, "bf16": True}, "two precisions"),
    ("networks_match", {"network_module": ["networks.lora"]}, "names 1 and network_weights 0"),
    ("networks_match", {"network_mul": [0.5]}, "network_mul has more values"),
    ("networks_match", {"network_merge": True}, "no network to merge"),
]


ADMIN_CASES = [
    ("command_is_named", {"command": None}, "there is nothing to do"),
    ("command_is_named", {"yes": True}, "yes cannot act in status"),
    ("command_is_named", {"command": "clean", "remove": True}, "remove cannot act in clean"),
    ("command_is_named", {"command": "pack", "delete_broken": True}, "delete_broken cannot act in pack"),
]


@pytest.mark.parametrize(("rule", "changes", "what"), ADMIN_CASES)
def test_rule_of_the_cache_tool_fires(rule, changes, what, complete):
    named = {name: complete[name] for name in ("train_data_dir", "resolution")}
    with pytest.raises(UserError) as caught:
        make_config("cache_admin", **{**named, "command": "status", **changes})
    (problem,) = caught.value.problems
    assert what in problem.what and problem.fix


@pytest.mark.parametrize(("rule", "changes", "what"), TRAINER_CASES)
def test_trainer_rule_fires(problems_of, rule, changes, what):
    (problem,) = problems_of(**changes)
    assert what in problem.what
    assert problem.fix


@pytest.mark.parametrize(("rule", "changes", "what"), FULL_CASES)
def test_rule_of_the_full_fine_tune_fires(problems_of, rule, changes, what):
    (problem,) = problems_of(run="sdxl_train", **changes)
    assert what in problem.what and problem.fix


@pytest.mark.parametrize(("rule", "changes", "what"), GENERATOR_CASES)
def test_generator_rule_fires(rule, changes, what):
    with pytest.raises(UserError) as caught:
        make_config("sdxl_gen_img", **{"ckpt": "tiny", "prompt": "a cat", **changes})
    (problem,) = caught.value.problems
    assert what in problem.what


def test_every_rule_has_a_case():
    cases = {rule for rule, _, _ in TRAINER_CASES + FULL_CASES + GENERATOR_CASES + ADMIN_CASES}
    assert {entry.check.__name__ for entry in validate.RULES} == cases


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_text_encoder_outputs": True, "network_train_unet_only": True, "caption_dropout_rate": 0.1},
        {"use_8bit_adam": True},
        {"use_8bit_adam": True, "optimizer_type": "AdamW8bit"},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.1},
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ['step_rules="1:10,0.1"']},
        {"min_timestep": 499, "max_timestep": 500},
        {"sample_every_n_steps": 0},
        {"random_crop": True},
        {"cache_latents": True, "flip_aug": True},
    ],
)
def test_legal_combinations_pass(problems_of, changes):
    assert problems_of(**changes) == ()


def test_settings_that_follow_from_others(complete):
    cfg = make_config(
        "sdxl_train_network",
        **complete,
        cache_latents_to_disk=True,
        cache_text_encoder_outputs_to_disk=True,
        network_train_unet_only=True,
        use_8bit_adam=True,
        mem_eff_attn=True,
    )
    assert cfg.data.cache_latents and cfg.data.cache_text_encoder_outputs and cfg.model.sdpa
    assert cfg.optim.optimizer_type == "AdamW8bit"
    assert cfg.provenance["cache_latents"] == "implied by cache_latents_to_disk"
    assert [notice.split()[0] for notice in cfg.notices] == [
        "cache_latents", "cache_text_encoder_outputs", "mem_eff_attn:",
    ]  # fmt: skip


def test_workers_are_limited_by_the_cores(complete, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert make_config("sdxl_train_network", **complete).data.max_data_loader_n_workers == 3
    cfg = make_config("sdxl_train_network", **complete, max_data_loader_n_workers=5)
    assert cfg.data.max_data_loader_n_workers == 3
    assert "instead of 5" in cfg.notices[0]
    assert (
        make_config("sdxl_train_network", **complete, max_data_loader_n_workers=2).data.max_data_loader_n_workers == 2
    )


def test_sampling_by_epochs_takes_the_place_of_steps(complete, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    settings = {"sample_prompts": str(prompts), "sample_every_n_epochs": 1, "sample_every_n_steps": 5}
    cfg = make_config("sdxl_train_network", **complete, **settings)
    assert cfg.preview.sample_every_n_steps is None
    assert "sample_every_n_steps is ignored" in cfg.notices[0]


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"clip_skip": 2}, "clip_skip is only recorded"),
        ({"max_train_steps": 10, "max_train_epochs": 1}, "max_train_steps is ignored"),
        ({"lr_scheduler_num_cycles": 3}, "lr_scheduler_num_cycles has no effect"),
        ({"network_train_unet_only": True, "text_encoder_lr": [1e-4]}, "text_encoder_lr has no effect"),
        ({"network_train_text_encoder_only": True, "unet_lr": 1e-4}, "unet_lr has no effect"),
        ({"save_n_epoch_ratio": 2, "save_every_n_epochs": 1}, "save_every_n_epochs is ignored"),
        ({"save_last_n_steps": 2}, "save_last_n_steps has no effect"),
        ({"save_last_n_epochs_state": 2}, "save_last_n_epochs_state has no effect"),
        ({"metadata_thumbnail": "no_such.png"}, "metadata_thumbnail is left out"),
        ({"dataset_repeats": 3}, "dataset_repeats has no effect"),
        ({"token_warmup_min": 3}, "token_warmup_min has no effect"),
        ({"sdpa": True, "xformers": True}, "sdpa and xformers"),
        ({"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0}, "persistent_data_loader_workers"),
        ({"tokenizer_cache_dir": "x"}, "tokenizer_cache_dir has no effect"),
        (
            {"cache_text_encoder_outputs": True, "network_train_unet_only": True, "text_cache_variants": 2},
            "text_cache_variants has no effect",
        ),
    ],
)
def test_settings_that_do_nothing_are_told(complete, changes, start):
    notices = make_config("sdxl_train_network", **complete, **changes).notices
    assert any(notice.startswith(start) for notice in notices)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pretrained_model_name_or_path": "models/base.safetensors"}, "does not exist"),
        ({"pretrained_model_name_or_path": "/no/such/folder"}, "does not exist"),
        ({"pretrained_model_name_or_path": "sdxl"}, "does not exist"),
        ({"vae": "vae.safetensors"}, "vae vae.safetensors does not exist"),
        ({"train_data_dir": "nowhere"}, "train_data_dir nowhere does not exist"),
        ({"dataset_config": "nowhere.toml"}, "dataset_config nowhere.toml does not exist"),
        ({"network_weights": "nowhere.safetensors"}, "network_weights nowhere.safetensors does not exist"),
        ({"resume": "nowhere"}, "resume nowhere does not exist"),
        ({"sample_prompts": "nowhere.txt"}, "sample_prompts nowhere.txt does not exist"),
        ({"sample_prompts": "prompts.md"}, "sample_prompts prompts.md is of no known kind"),
        ({"network_module": "networks.laro"}, "network_module networks.laro does not exist"),
        ({"network_module": "networks.dylora"}, "network_module networks.dylora is not supported yet"),
        ({"network_module": "no_such_package.kohya"}, "cannot be found"),
    ],
)
def test_missing_files_are_found_before_anything_is_loaded(problems_of, changes, what):
    (problem,) = problems_of(**changes)
    assert what in problem.what
    assert problem.where == "argument"


def test_hub_ids_and_existing_paths_pass(problems_of, tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert problems_of(pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0") == ()
    assert problems_of(pretrained_model_name_or_path=str(tmp_path / "model.safetensors")) == ()
    assert problems_of(vae=str(tmp_path)) == ()
    assert problems_of(network_module="lora") == ()


def test_a_folder_beside_us_is_no_owner_on_the_hub(problems_of, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    (problem,) = problems_of(pretrained_model_name_or_path="models/sdxl")
    assert problem.what == "pretrained_model_name_or_path models/sdxl does not exist"


def test_misspelt_path_gets_a_suggestion(problems_of, tmp_path):
    (tmp_path / "model.safetensors").touch()
    (problem,) = problems_of(pretrained_model_name_or_path=str(tmp_path / "modell.safetensors"))
    assert problem.fix == f"did you mean {tmp_path / 'model.safetensors'}?"
    (problem,) = problems_of(pretrained_model_name_or_path=str(tmp_path / "no" / "model.safetensors"))
    assert problem.fix == f"there is no folder {tmp_path / 'no'}"


def test_pattern_names_one_checkpoint(tmp_path):
    (tmp_path / "epoch-1.safetensors").touch()
    argv = ["--ckpt", str(tmp_path / "epoch-*.safetensors"), "--prompt", "a cat --w 128 --n dog"]
    cfg = parse("sdxl_gen_img", argv)
    assert cfg.generate.ckpt == str(tmp_path / "epoch-1.safetensors")
    assert cfg.generate.prompt == "a cat --w 128 --n dog"
    (tmp_path / "epoch-2.safetensors").touch()
    with pytest.raises(UserError, match="does not exist"):
        parse("sdxl_gen_img", argv)


def test_generator_reads_networks(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").touch()
    weights = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    cfg = parse(
        "sdxl_gen_img",
        ["--ckpt", "tiny", "--prompt", "", "--network_module", "networks.lora", "networks.lora",
         "--network_weights", *weights, "--network_mul", "-0.5", "1", "--network_args", "a=1;b=2"],
    )  # fmt: skip
    assert cfg.generate.network_mul == (-0.5, 1.0)
    assert cfg.generate.network_kwargs(0) == {"a": "1", "b": "2"}
    assert cfg.generate.network_kwargs(1) == {}
    assert cfg.generate.prompt is None
