"""Options of trackers: what is sent, what is hidden, what has to be there."""

import pytest

from library.config import check_files
from library.config.cli import make_config
from library.config.effective import config_lines, write_config
from library.config.sanitised import sanitised
from library.config.tracker_file import read_tracker_file
from library.errors import UserError

KEY = "0123456789abcdef"


def test_the_key_is_never_printed_written_or_sent(complete, tmp_path):
    cfg = make_config("sdxl_train_network", **complete, wandb_api_key=KEY)
    assert cfg.loop.wandb_api_key == KEY
    written = write_config(cfg, str(tmp_path / "written")).read_text()
    for text in ("\n".join(config_lines(cfg)), written, repr(cfg), str(sanitised(cfg))):
        assert KEY not in text and "output_dir" in text


def test_settings_that_are_sent_hold_no_folder(complete, tmp_path):
    cfg = make_config(
        "sdxl_train_network",
        **complete,
        network_args=[f"preset='{tmp_path}/presets/mine.toml'", "conv_dim=4"],
        training_comment=f"see {tmp_path}/notes and https://example.org/a, 1/2 of ~/pictures/cats",
        metadata_author="a/b",
    )
    sent = sanitised(cfg)
    assert str(tmp_path) not in str(sent) and str(tmp_path.name) not in str(sent)
    assert sent["train_data_dir"] == "images" and sent["output_dir"] == "out"
    assert sent["network_args"] == ["preset='mine.toml'", "conv_dim=4"]
    assert sent["training_comment"] == "see notes and https://example.org/a, 1/2 of cats"
    assert sent["metadata_author"] == "a/b"
    assert sent["resolution"] == "512x512" and sent["learning_rate"] == cfg.optim.learning_rate
    assert "sample_prompts" not in sent, "what is unset is not sent"


def test_a_hub_id_stays_whole(complete):
    changed = {**complete, "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"}
    sent = sanitised(make_config("sdxl_train_network", **changed))
    assert sent["pretrained_model_name_or_path"] == "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize("tracker", ["wandb", "all"])
def test_wandb_has_to_be_installed_when_it_is_asked_for(problems_of, tracker, monkeypatch):
    monkeypatch.setattr(check_files, "find_spec", lambda name: None)
    (problem,) = problems_of(log_with=tracker)
    assert (
        problem.what == f"log_with {tracker} needs wandb, which is not installed" and "pip install wandb" in problem.fix
    )
    assert problems_of(log_with="tensorboard") == ()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "does not exist"),
        ("[wandb", "is not TOML"),
        ("[wandbs]\ntags = []", "wandbs is no table of a tracker"),
        ("wandb = 3", "wandb is no table of a tracker"),
    ],
)
def test_a_wrong_tracker_file_is_found_at_once(problems_of, tmp_path, text, what):
    path = tmp_path / "trackers.toml"
    if text is not None:
        path.write_text(text)
    (problem,) = problems_of(log_tracker_config=str(path))
    assert what in problem.what and problem.fix
    with pytest.raises(UserError, match="tracker"):
        read_tracker_file(str(path))


def test_what_acts_on_wandb_alone_says_so(complete):
    cfg = make_config("sdxl_train_network", **complete, wandb_run_name="cat", wandb_api_key=KEY)
    assert [notice for notice in cfg.notices if "wandb" in notice] == [
        "wandb_run_name has no effect: it acts with log_with wandb",
        "wandb_api_key has no effect: it acts with log_with wandb",
    ]
