"""Every flag of sd-scripts is implemented, told to have no effect, or refused by name."""

import pytest

from library.config.cli import parse
from library.config.fields import Option
from library.config.known_flags import (
    COMMAND_LINE_ONLY,
    NO_EFFECT,
    REFUSED,
    KnownFlag,
    foreign_flag,
    known_flags,
    notice_without_effect,
)
from library.config.runs import RUNS
from library.errors import UserError

TRAINER = RUNS["sdxl_train_network"].options() | RUNS["sdxl_train"].options()
OPTIONS = {name for run in RUNS.values() for name in run.options()}
ALIASES = {alias for option in TRAINER.values() for alias in option.aliases}
FOREIGN = sorted(set(known_flags()) - OPTIONS - ALIASES - COMMAND_LINE_ONLY)

# Where our default is not sd-scripts': name -> why.
OTHER_DEFAULTS = {
    "optimizer_type": "AdamW is what the empty text means there",
    "sample_sampler": "euler_a (docs/differences.md)",
    "max_token_length": "75 is what unset means there",
    "min_timestep": "0 is what unset means there",
    "max_timestep": "1000 is what unset means there",
    "timestep_sampling": "only for other models there",
    "text_encoder_batch_size": "only for other models there",
}

# Where a text of sd-scripts is read as what it holds.
OTHER_KINDS = {"block_lr": "float list"}


def _meaningful(known: KnownFlag) -> object:
    """A value that is neither the default nor switched off."""
    return {"flag": True, "int": 7, "float": 0.7, "float list": [0.7], "str list": ["x"]}.get(known.kind, "x")


@pytest.mark.parametrize("run", RUNS)
def test_flag_that_is_not_there_is_refused_by_name(run):
    for name in FOREIGN:
        problem = foreign_flag(name, _meaningful(known_flags()[name]), run=run, where="run.toml line 3")
        assert problem is not None, name
        assert problem.what.startswith(name)
        assert "supported" in problem.what or "other model families" in problem.what
        assert problem.where == "run.toml line 3"


def test_flag_at_its_default_asks_for_nothing():
    for name in FOREIGN:
        default = known_flags()[name].default
        for value in (default, "None", "" if default is None else default):
            assert foreign_flag(name, value, run="sdxl_train_network", where="") is None, name


def test_zero_is_a_value_where_it_does_something():
    assert foreign_flag("noise_offset", 0, run="sdxl_train_network", where="") is None
    assert foreign_flag("learning_rate_te1", 0, run="sdxl_train_network", where="") is not None  # freezes it there


def test_files_of_other_programs_are_full_of_defaults(run_toml, toml_text):
    cfg = run_toml(
        f"{toml_text}noise_offset = 0\nmin_snr_gamma = 0.0\nfull_bf16 = false\nhuber_c = 0.1\nwandb_run_name = ''\n"
        "base_weights = 'None'\nprior_loss_weight = 1\ntoken_warmup_step = 0\n"
    )
    assert cfg.notices == []


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["--torch_compile"], "--torch_compile is not supported yet"),
        (["--t5xxl=a"], "--t5xxl only acts for other model families"),
        (["--v2"], "--v2 is for Stable Diffusion 2"),
        (["--outdir", "a"], "--outdir is an option of sdxl_gen_img.py, not of sdxl_train_network.py"),
        (["--ratios", "1", "2"], "--ratios is not supported yet (sd-scripts has it in merge_lora.py, "),
        (["--train_text_encoder"], "--train_text_encoder is an option of sdxl_train.py"),
    ],
)
def test_flags_are_refused_on_the_command_line(argv, what):
    with pytest.raises(UserError) as caught:
        parse("sdxl_train_network", argv)
    assert caught.value.problems[0].what.startswith(what)
    assert caught.value.problems[0].where == "command line"


def test_flags_at_their_default_pass_on_the_command_line(complete):
    argv = [text for name, value in complete.items() for text in (f"--{name}", str(value))]
    cfg = parse("sdxl_train_network", [*argv, "--huber_c", "0.1", "--noise_offset=0", "--lowram", "--seed", "1"])
    assert cfg.loop.seed == 1
    assert [notice.split()[0] for notice in cfg.notices] == ["lowram"]


def test_options_agree_with_sd_scripts():
    for name in sorted(set(TRAINER) & set(known_flags())):
        known, option = known_flags()[name], TRAINER[name]
        assert known.letters & {"N", "T", "I", "cl", "ct", "x"}, name
        assert _kind(option) == OTHER_KINDS.get(name, known.kind), name
        default = None if option.default == () else option.default
        assert (default != known.default) == (name in OTHER_DEFAULTS), name


def _kind(option: Option) -> str:
    kinds = {"bool": "flag", "size": "str", "span": "str", "share": "float"}
    return kinds.get(option.kind, option.kind) + (" list" if option.many else "")


def test_flags_without_effect_are_known_and_not_options():
    for name, (runs, reason) in NO_EFFECT.items():
        assert name in known_flags()
        assert reason
        assert not any(name in RUNS[run].options() for run in runs)


def test_a_folder_of_masks_belongs_to_a_subset():
    problem = foreign_flag("conditioning_data_dir", "masks", run="sdxl_train_network", where="command line")
    assert "in the dataset file only" in problem.what and "[[datasets.subsets]]" in problem.fix


def test_every_flag_of_sd_scripts_generator_acts_or_is_explained():
    options = RUNS["sdxl_gen_img"].options()
    flags = {name for name, flag in known_flags().items() if "G" in flag.letters}
    assert len(flags) == 78
    for name in flags - set(options):
        reason = notice_without_effect(name, "sdxl_gen_img") or REFUSED.get(name, [""])[0]
        assert reason.startswith(name) and len(reason) > len(name) + 20, name
    with pytest.raises(UserError, match=r"(?s)vae_slices is not supported: .*use vae_tiling"):
        parse("sdxl_gen_img", ["--ckpt", "tiny", "--prompt", "a", "--vae_slices", "4"])
