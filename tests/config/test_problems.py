"""What is wrong is said all at once, with its place and the way out."""

import pytest

from library.config.cli import parse
from library.config.runs import RUNS
from library.config.values import Given, build_config
from library.errors import UserError


def _problems(run_toml, text, *argv, **settings):
    with pytest.raises(UserError) as caught:
        run_toml(text, *argv, **settings)
    return caught.value.problems


def test_all_problems_are_reported_together(run_toml, tmp_path):
    (tmp_path / "data.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'nowhere'\nnum_repeat = 2\n")
    text = (
        "pretrained_model_name_or_path = 'missing.safetensors'\n"
        "learning_rate = 'abc'\n"
        "lerning_rate_2 = 1\n"
        "deepspeed = true\n"
        "network_train_unet_only = true\n"
        "network_train_text_encoder_only = true\n"
        "dataset_config = 'data.toml'\n"
        "sample_prompts = 'prompts.txt'\n"
        "resolution = 512\n"
    )
    found = [(problem.what, problem.where) for problem in _problems(run_toml, text, "--network_dim", "x")]
    expected = {
        "lerning_rate_2 is not an option": "run.toml line 3",
        "deepspeed is not supported yet": "run.toml line 4",
        'learning_rate = "abc" must be a number': "run.toml line 2",
        'network_dim = "x" must be a whole number': "command line",
        "network_train_unet_only and network_train_text_encoder_only leave nothing to train": (
            "network_train_unet_only = true (run.toml line 5), network_train_text_encoder_only = true (run.toml line 6)"
        ),
        "output_dir is missing": "",
        "network_module is missing": "",
        "pretrained_model_name_or_path missing.safetensors does not exist": "run.toml line 1",
        "sample_prompts prompts.txt does not exist": "run.toml line 8",
        "num_repeat is not a key of subset 1": "data.toml line 4",
        "image_dir nowhere does not exist": "data.toml line 3",
    }
    assert dict(found) == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("key", "near"),
    [("lerning_rate", "learning_rate"), ("network-dim", "network_dim"), ("batch_size", "train_batch_size")],
)
def test_unknown_names_get_a_suggestion(run_toml, toml_text, key, near):
    (from_file,) = _problems(run_toml, f'{toml_text}"{key}" = 3\n')
    (from_flag,) = _problems(run_toml, toml_text, f"--{key}", "3")
    assert from_file.fix == from_flag.fix == f"did you mean {near}?"
    assert (from_file.where, from_flag.where) == ("run.toml line 6", "command line")


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ('learning_rate = "1e-4"', '= "1e-4" must be a number', "remove the quotes: learning_rate = 1e-4"),
        ("learning_rate = true", "learning_rate = true must be a number", ""),
        ("learning_rate = inf", "learning_rate = inf must be a finite number", ""),
        ("learning_rate = -1", "learning_rate = -1 must be at least 0", ""),
        ("network_dim = 4.5", "network_dim = 4.5 must be a whole number", ""),
        ("network_dim = 0", "network_dim = 0 must be at least 1", ""),
        ('enable_bucket = "true"', 'enable_bucket = "true" must be true or false', "enable_bucket = true"),
        ("enable_bucket = 1", "enable_bucket = 1 must be true or false", ""),
        ("output_name = 3", "output_name = 3 must be a text in quotes", ""),
        ("output_name = 'a/b'", "the folder belongs in output_dir", ""),
        ("resolution = 'large'", 'resolution = "large" is not a resolution', ""),
        ("resolution = [1, 2, 3]", "resolution = [1, 2, 3] is not a resolution", ""),
        ("max_token_length = 100", "max_token_length = 100 must be a multiple of 75", ""),
        ("lr_warmup_steps = 2.5", "lr_warmup_steps = 2.5 must be a whole number", ""),
        ("lr_warmup_steps = '200%'", "between 0% and 100%", ""),
        ("optimizer_args = 'a=1 b=2'", "must be an array of texts", 'optimizer_args = ["a=1", "b=2"]'),
        ("optimizer_args = ['a=b']", "not a Python literal", ""),
        ("optimizer_args = ['a=1', 'a=2']", "names a twice", ""),
        ("network_args = ['conv_dim']", "not of the form key=value", ""),
        ("text_encoder_lr = [1e-4, 1e-4, 1e-4]", "two text encoders", ""),
        ("text_encoder_lr = ['a']", "must be an array of numbers", ""),
        ("optimizer_type = 'AdamWScheduleFre'", "did you mean AdamWScheduleFree?", ""),
        ("optimizer_type = 'AdmW'", "did you mean AdamW?", ""),
        ("lr_scheduler_type = 'StepRL'", "did you mean StepLR?", ""),
        ("lr_scheduler_type = 'torch.optim.'", "is not a scheduler class", ""),
        ("lr_scheduler_timescale = 0", "must be at least 1", ""),
        ("lr_scheduler = 'sinus'", 'lr_scheduler = "sinus" is not one of: constant', ""),
        ("loss_type = 'hubber'", "is not one of: ", ""),
        ("save_model_as = 'ckpt'", "only safetensors", ""),
        ("mixed_precision = 'fp8'", "is not one of: no, fp16, bf16", ""),
        ("caption_dropout_rate = 1.5", "must be at most 1", ""),
        ('vae = "C:\\train"', "single quotes", ""),
        ("learning_rate = 1979-05-27", "must be a number", ""),
    ],
)  # fmt: skip
def test_wrong_values_become_sentences(run_toml, toml_text, line, what, fix):
    text = "\n".join(kept for kept in toml_text.splitlines() if kept.split()[0] != line.split()[0])
    (problem,) = _problems(run_toml, f"{line}\n{text}\n")
    assert what in problem.what
    assert problem.where == "run.toml line 1"
    assert fix in problem.fix


def test_duplicate_key_in_the_run_file(run_toml, toml_text):
    (problem,) = _problems(run_toml, f"{toml_text}seed = 1\nseed = 2\n")
    assert (problem.what, problem.where) == ("seed is given twice", "run.toml lines 6 and 7")


def test_missing_config_file_suggests_its_neighbour(run_toml, toml_text):
    run_toml(toml_text)
    with pytest.raises(UserError, match="rum\\.toml does not exist") as caught:
        parse("sdxl_train_network", ["--config_file", "rum"])
    assert caught.value.problems[0].fix == "did you mean run.toml?"


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["--seed"], "--seed needs a value"),
        (["--config_file"], "config_file needs a value"),
        (["stray"], "'stray' belongs to no flag"),
        (["--enable_bucket", "true"], "'true' belongs to no flag"),
        (["--enable_bucket=true"], "the command line cannot be read"),
        (["--lear", "3"], "--lear is not an option"),
    ],
)
def test_wrong_command_lines(argv, what):
    with pytest.raises(UserError) as caught:
        parse("sdxl_train_network", argv)
    assert any(what in problem.what for problem in caught.value.problems)


def test_wrong_values_do_not_hide_behind_rules_about_them(run_toml, toml_text):
    text = toml_text.replace("resolution = 512", "resolution = 'large'")
    (problem,) = _problems(run_toml, f"{text}enable_bucket = true\ncache_latents = 'yes'\nrandom_crop = true\n")[1:]
    assert problem.what.startswith("cache_latents")


def test_right_values_stay_when_others_are_wrong():
    given = {"learning_rate": Given("abc", "a"), "max_grad_norm": Given(0.5, "b")}
    cfg, wrong = build_config(RUNS["sdxl_train_network"], given)
    assert list(wrong) == ["learning_rate"]
    assert (cfg.optim.max_grad_norm, cfg.optim.learning_rate) == (0.5, 2e-6)


def test_dataset_tables_in_the_run_file_are_explained(run_toml, toml_text):
    (problem,) = _problems(run_toml, f"{toml_text}[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n")
    assert "dataset_config" in problem.fix
    assert problem.where == "run.toml line 6"
