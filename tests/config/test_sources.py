"""Where values come from: command line, file, default; and how they go out again."""

import pickle
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.config.cli import make_config, parse
from library.config.effective import config_lines, write_config
from library.config.fields import Option
from library.config.run_config import SECRETS
from library.config.runs import RUNS
from library.config.spans import Span
from library.config.values import Given, build_config
from library.errors import UserError
from library.sizes import Size


def test_command_line_beats_file_beats_default(run_toml, toml_text):
    text = f"{toml_text}learning_rate = 1e-3\nnetwork_dim = 8\n"
    cfg = run_toml(text, "--learning_rate", "1e-5", "--seed=7")
    assert (cfg.optim.learning_rate, cfg.network.network_dim, cfg.loop.seed) == (1e-5, 8, 7)
    assert cfg.optim.max_grad_norm == 1.0
    assert cfg.provenance["learning_rate"] == "command line"
    assert cfg.provenance["network_dim"] == "run.toml line 7"
    assert cfg.provenance["max_grad_norm"] == "default"
    assert cfg.flat()["network_dim"] == 8


def test_sections_are_ignored(run_toml, complete, toml_text):
    flat = run_toml(toml_text)
    sectioned = run_toml("".join(f"[s{number}]\n{line}\n" for number, line in enumerate(toml_text.splitlines())))
    assert sectioned.flat() == flat.flat() == make_config("sdxl_train_network", **complete).flat()


def test_the_last_of_two_sections_counts_and_is_told(run_toml, toml_text):
    cfg = run_toml(f"{toml_text}[a]\nseed = 1\n[b]\nseed = 2\n")
    assert cfg.loop.seed == 2
    assert any("run.toml line 7" in notice and "run.toml line 9" in notice for notice in cfg.notices)


def test_toml_suffix_may_be_left_out(run_toml, toml_text):
    run_toml(toml_text)
    assert parse("sdxl_train_network", ["--config_file", "run"]).provenance["resolution"] == "run.toml line 3"


def test_booleans_of_a_file_can_be_switched_off(run_toml, toml_text):
    text = f"{toml_text}enable_bucket = true\nno_half_vae = true\n"
    assert run_toml(text).data.enable_bucket
    cfg = run_toml(text, "--no_enable_bucket", "--half_vae")
    assert not cfg.data.enable_bucket
    assert not cfg.model.no_half_vae


def test_lists_stand_behind_one_flag(run_toml, toml_text):
    cfg = run_toml(
        toml_text, "--optimizer_args", "weight_decay=0.1", "betas=0.9,0.95", "--text_encoder_lr", "1e-4", "2e-4",
        "--network_args", "conv_dim=4", "algo=a=b",
    )  # fmt: skip
    assert cfg.optim.optimizer_kwargs() == {"weight_decay": 0.1, "betas": (0.9, 0.95)}
    assert cfg.network.text_encoder_lr == (1e-4, 2e-4)
    assert cfg.network.network_kwargs() == {"conv_dim": "4", "algo": "a=b"}


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("resolution = 768", "resolution", Size(768, 768)),
        ('resolution = "768,512"', "resolution", Size(768, 512)),
        ("resolution = [768, 512]", "resolution", Size(768, 512)),
        ("lr_warmup_steps = 100", "lr_warmup_steps", 100),
        ("lr_warmup_steps = 0.1", "lr_warmup_steps", 0.1),
        ("lr_warmup_steps = 1.0", "lr_warmup_steps", 1),
        ('lr_warmup_steps = "10%"', "lr_warmup_steps", 0.1),
        ('lr_warmup_steps = "100%"', "lr_warmup_steps", 1.0),
        ("max_train_steps = 1e3", "max_train_steps", 1000),
        ("text_encoder_lr = 1e-5", "text_encoder_lr", (1e-5,)),
        ("learning_rate = 1", "learning_rate", 1.0),
        ("max_token_length = 75", "max_token_length", 75),
        ("max_token_length = 300", "max_token_length", 300),
        ('vae = ""', "vae", None),
        ('save_precision = "None"', "save_precision", None),
        ('caption_prefix = "None"', "caption_prefix", "None"),
        ("sample_every_n_steps = 0", "sample_every_n_steps", None),
        ("max_train_epochs = 0", "max_train_epochs", None),
        ('optimizer_type = "AdaFactor"', "optimizer_type", "Adafactor"),
        ('optimizer_type = "adamw8BIT"', "optimizer_type", "AdamW8bit"),
        ('optimizer_type = "SGD"', "optimizer_type", "torch.optim.SGD"),
        ('optimizer_type = "pagedadamw8bit"', "optimizer_type", "PagedAdamW8bit"),
        ('lr_scheduler_type = "StepLR"', "lr_scheduler_type", "torch.optim.lr_scheduler.StepLR"),
        ('lr_scheduler_type = "my_package.Schedule"', "lr_scheduler_type", "my_package.Schedule"),
        ('optimizer_type = "pytorch_optimizer.CAME"', "optimizer_type", "pytorch_optimizer.CAME"),
        ('caption_extention = "txt"', "caption_extension", ".txt"),
        ('train_data_dir = "~/images"', "train_data_dir", str(Path("~/images").expanduser())),
    ],
)
def test_usual_spellings_work(line, name, value):
    key, _, _ = line.partition(" ")
    option = "caption_extension" if key == "caption_extention" else key
    given_value = {option: Given(tomllib.loads(line)[key], "file")}
    cfg, wrong = build_config(RUNS["sdxl_train_network"], given_value)
    assert not wrong
    assert cfg.get(name) == value
    assert type(cfg.get(name)) is type(value)


def test_command_line_takes_the_same_spellings(complete, capsys):
    argv = [text for name, value in complete.items() for text in (f"--{name}", str(value))]
    cfg = parse(
        "sdxl_train_network",
        [
            *argv,
            "--lr_scheduler",
            "linear",
            "--lr_warmup_steps",
            "1.0",
            "--max_token_length",
            "75",
            "--resolution",
            "512,768",
            "--unet_lr",
            "1",
        ],
    )
    assert (cfg.optim.lr_warmup_steps, cfg.model.max_token_length) == (1, 75)
    assert cfg.data.resolution == Size(512, 768)
    assert cfg.network.unet_lr == 1.0


def _strategy(option: Option) -> st.SearchStrategy:
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    by_kind = {
        "bool": st.booleans(),
        "int": st.integers(1, 1000),
        "float": st.floats(0, 1, exclude_max=True),
        "size": st.builds(Size, st.integers(1, 4096), st.integers(1, 4096)),
        "span": st.builds(lambda low, more: Span(low, low + more), st.floats(0.1, 9), st.floats(0, 9)),
        "share": st.one_of(st.integers(0, 1000), st.floats(0, 1)),
        "str": st.sampled_from(option.choices) if option.choices else text,
    }
    one = by_kind[option.kind]
    return st.lists(one, min_size=1, max_size=2).map(tuple) if option.many else one


@st.composite
def _configurations(draw: st.DrawFn, run: str) -> dict[str, Given]:
    options = RUNS[run].options()
    names = draw(st.lists(st.sampled_from(sorted(options.keys() - SECRETS)), unique=True, max_size=12))
    return {name: Given(draw(_strategy(options[name])), "argument") for name in names}


@pytest.mark.parametrize("run", ["sdxl_train_network", "sdxl_gen_img"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much])
@given(data=st.data())
def test_written_configuration_reads_back_the_same(run, data, tmp_path_factory):
    values = data.draw(_configurations(run))
    cfg, wrong = build_config(RUNS[run], values)
    cfg, _ = build_config(RUNS[run], {name: value for name, value in values.items() if name not in wrong})
    path = write_config(cfg, str(tmp_path_factory.mktemp("config") / "written"))
    for text in (path.read_text(encoding="utf-8"), "\n".join(config_lines(cfg))):
        table = tomllib.loads(text)
        flat = {name: Given(value, "file") for section in table.values() for name, value in section.items()}
        again, problems = build_config(RUNS[run], flat)
        assert not problems
        assert again.flat() == cfg.flat()


def test_all_steps_are_written_as_a_percentage():
    cfg, _ = build_config(RUNS["sdxl_train_network"], {"lr_warmup_steps": Given("100%", "argument")})
    assert 'lr_warmup_steps = "100%"  # argument' in config_lines(cfg)


def test_output_config_writes_what_differs_and_stops(tmp_path, capsys):
    path = tmp_path / "new.toml"
    argv = [
        "--config_file",
        str(path),
        "--output_config",
        "--learning_rate",
        "1e-4",
        "--seed",
        "3",
        "--max_grad_norm",
        "1",
    ]
    with pytest.raises(SystemExit) as ended:
        parse("sdxl_train_network", argv)
    assert ended.value.code == 0
    assert tomllib.loads(path.read_text()) == {"optim": {"learning_rate": 1e-4}, "loop": {"seed": 3}}
    with pytest.raises(UserError, match="exists already"):
        parse("sdxl_train_network", argv)
    assert tomllib.loads(path.read_text())["loop"] == {"seed": 3}


def test_output_config_needs_a_name_and_right_values(tmp_path):
    with pytest.raises(UserError, match="output_config needs config_file"):
        parse("sdxl_train_network", ["--output_config"])
    with pytest.raises(UserError, match="must be a number"):
        parse("sdxl_train_network", ["--config_file", str(tmp_path / "a"), "--output_config", "--learning_rate", "a"])
    assert not (tmp_path / "a.toml").exists()


def test_print_config_shows_values_with_their_origin(run_toml, toml_text, capsys):
    with pytest.raises(SystemExit) as ended:
        run_toml(f"{toml_text}seed = 3\n", "--print_config", "--network_dim", "4")
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "seed = 3  # run.toml line 6" in lines
    assert "network_dim = 4  # command line" in lines
    assert "# max_grad_norm = 1.0  # default" in lines
    assert "# vae =  # default" in lines


def test_configuration_is_immutable(complete):
    cfg = make_config("sdxl_train_network", **complete)
    with pytest.raises(ValueError, match="frozen"):
        cfg.optim.learning_rate = 1.0


def test_configuration_goes_through_pickle(complete):
    cfg = make_config("sdxl_train_network", **complete)
    again = pickle.loads(pickle.dumps(cfg))
    assert (again.run, again.flat(), again.provenance) == (cfg.run, cfg.flat(), cfg.provenance)


def test_shared_file_serves_the_cache_tools(run_toml, toml_text):
    text = f"{toml_text}learning_rate = 1e-4\ncaption_dropout_rate = 0.1\n"
    latents = run_toml(text, run="cache_latents")
    texts = run_toml(text, run="cache_text_encoder_outputs")
    assert latents.data.cache_latents_to_disk and latents.data.cache_latents
    assert texts.data.cache_text_encoder_outputs_to_disk and texts.data.cache_text_encoder_outputs
    assert latents.provenance["cache_latents"] == "what this tool does"
    assert not latents.notices
    told = run_toml(text, "--learning_rate", "1e-4", "--sdxl", run="cache_latents").notices
    assert [notice.split()[0] for notice in told] == ["sdxl", "learning_rate"]


def test_cache_tools_need_no_training_options(complete):
    for run in ("cache_latents", "cache_text_encoder_outputs"):
        make_config(
            run, **{name: complete[name] for name in ("pretrained_model_name_or_path", "train_data_dir", "resolution")}
        )
