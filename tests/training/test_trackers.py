"""TensorBoard and Weights & Biases are told what the JSONL file holds."""

import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.errors import UserError
from library.training import trackers
from library.training.metrics import MACHINE_KEYS, RunLog


class _StandIn(types.ModuleType):
    """As much of wandb as is used, with a record of the calls."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.keys, self.finished = [], [], [], 0
        self.accepts = True

    def login(self, key=None, timeout=None):
        self.keys.append(key)
        return self.accepts

    def init(self, *, project=None, name=None, dir=None, config=None, tags=None):
        self.arguments = list(sys.argv[1:])
        self.started.append({"project": project, "name": name, "dir": dir, "config": config, "tags": tags})
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    module = _StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """settings(**options): a trainer's configuration without what is checked elsewhere."""
    from library.config.runs import RUNS
    from library.config.values import Given, build_config

    def make(**options):
        given = {"output_dir": str(tmp_path / "out"), "train_data_dir": str(tmp_path / "data"), **options}
        cfg, problems = build_config(RUNS["sdxl_train_network"], {k: Given(v, "test") for k, v in given.items()})
        assert not problems
        return cfg

    return make


RECORDS = [
    {"step": 1, "epoch": 1, "loss": 0.5, "lr/unet": 1e-4},
    {"step": 2, "epoch": 1, "loss": 0.25, "lr/unet": 1e-4, "loss_band/000-099": 0.125, "images": ["a.png"]},
]


def _write(cfg, tmp_path):
    log = RunLog(tmp_path / "log.jsonl", trackers.open_trackers(cfg), resumed_step=0)
    log.write(RECORDS, images_per_second=3.0, data_wait=0.5, peak_memory_gib=1.0)
    log.note({"step": 2, "epoch": 1, "loss/validation/held_out": 0.75})
    log.close()


def test_tensorboard_gets_every_number_by_its_name(settings, tmp_path):
    _write(settings(log_prefix="p-", log_tracker_name="cats", log_config=True), tmp_path)
    (folder,) = (tmp_path / "out" / "logs").iterdir()
    assert folder.name.startswith("p-") and [each.name for each in folder.iterdir()] == ["cats"]
    events = EventAccumulator(str(folder / "cats")).Reload()
    scalars = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars["train/loss"] == [(1, 0.5), (2, 0.25)]
    assert scalars["loss_band/000-099"] == [(2, 0.125)]
    assert scalars["train/data_wait"] == [(2, 0.5)]
    assert scalars["loss/validation/held_out"] == [(2, 0.75)]
    assert set(scalars) == {"train/loss", "lr/unet", "loss_band/000-099", "loss/validation/held_out"} | {
        f"train/{name}" for name in MACHINE_KEYS if name != "time"
    }
    (text,) = events.Tensors("settings/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert '"train_data_dir": "data"' in shown and str(tmp_path) not in shown


def test_wandb_gets_the_same_and_never_the_command_line(settings, tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--wandb_api_key=k"])
    (tmp_path / "t.toml").write_text('[wandb]\ntags = ["x"]\n[tensorboard]\nflush_secs = 5\n')
    cfg = settings(log_with="wandb", wandb_run_name="cat", log_tracker_config=str(tmp_path / "t.toml"), log_config=True)
    _write(cfg, tmp_path)
    assert wandb.arguments == [] and sys.argv[1:] == ["--wandb_api_key=k"]
    (started,) = wandb.started
    assert (started["project"], started["name"], started["tags"]) == ("network_train", "cat", ["x"])
    assert started["config"]["output_dir"] == "out"
    assert wandb.logged[0] == (1, {"train/loss": 0.5, "lr/unet": 1e-4})
    assert wandb.logged[1][1]["train/images_per_second"] == 3.0
    assert "train/images" not in wandb.logged[1][1], "names of images stay here"
    assert wandb.logged[2] == (2, {"loss/validation/held_out": 0.75})
    assert wandb.finished == 1


def test_settings_are_sent_only_when_asked(settings, tmp_path, wandb):
    _write(settings(log_with="all", log_tracker_name="cats"), tmp_path)
    assert wandb.started[0]["config"] is None and wandb.started[0]["project"] == "cats"


def test_the_key_is_tried_before_the_model_is_loaded(settings, wandb, monkeypatch):
    trackers.check(settings())
    assert wandb.keys == []
    trackers.check(settings(log_with="wandb", wandb_api_key="k"))
    trackers.check(settings(log_with="wandb"))
    assert wandb.keys == ["k", None]
    wandb.accepts = False
    with pytest.raises(UserError, match="not logged in"):
        trackers.check(settings(log_with="wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check(settings(log_with="wandb"))


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_arguments_that_do_not_fit_are_named(settings, tmp_path, wandb, name):
    (tmp_path / "t.toml").write_text(f"[{name}]\nnonsense = 1\n")
    with pytest.raises(UserError, match=rf"\[{name}\] does not fit.*nonsense"):
        trackers.open_trackers(settings(log_with="wandb", log_tracker_config=str(tmp_path / "t.toml")))


def test_a_missing_package_is_named_with_the_way_to_get_it(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError) as caught:
        trackers.check(settings(log_with="all"))
    assert "pip install wandb" in caught.value.problems[0].fix
