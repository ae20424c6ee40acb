"""Validation, sample pictures and averaged weights look at a run and never change it."""

import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.e2e.conftest import copy_log, log_of

HELD = ["--validation_split=0.3", "--max_train_steps=6", "--network_dropout=0.1", "--save_state"]
SEEN = [
    "--validate_every_n_steps=2",
    "--validate_at_first",
    "--validation_timesteps=2",
    "--use_ema",
    "--ema_decay=0.9",
    "--validate_with_ema",
    "--sample_every_n_steps=3",
    "--sample_at_first",
    "--sample_with_ema",
    "--sample_grid",
]


def _records(output):
    """Records of the steps and records of the validation, without what depends on the machine."""
    records = log_of(output)
    return [r for r in records if "loss" in r], [r for r in records if "loss" not in r]


def _equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle --w 64 --h 64 --s 2\na blue square --w 64 --h 64 --s 2 --d 5\n")
    return path


@pytest.mark.e2e
def test_looking_at_a_run_changes_nothing_and_resuming_it_is_exact(train, prompts):
    plain = train("plain", *HELD, "--validate_every_n_epochs=1000")
    flags = [*HELD, *SEEN, f"--sample_prompts={prompts}", "--ema_update_interval=2"]
    whole = train("whole", *flags, "--save_every_n_steps=3")
    steps, validations = _records(whole)
    assert steps == _records(plain)[0] and len(steps) == 6
    assert _equal(load_file(plain / "net.safetensors"), load_file(whole / "net.safetensors"))
    assert [record["step"] for record in validations] == [0, 2, 4, 5, 6], "an epoch has five steps"

    resumed = whole.parent / "resumed"
    copy_log(whole, resumed)
    (resumed / "sample").mkdir()
    for path in (whole / "sample").glob("net_00000[036]_0?_*.png"):
        (resumed / "sample" / path.name).write_bytes(path.read_bytes())
    train("resumed", *flags, f"--resume={whole / 'net-step00000003-state'}")
    assert _records(resumed) == (steps, validations)
    for name in ("net.safetensors", "net-ema.safetensors"):
        assert _equal(load_file(whole / name), load_file(resumed / name))
    assert not _equal(load_file(whole / "net.safetensors"), load_file(whole / "net-ema.safetensors"))
    assert _equal(_average(whole), _average(resumed))
    grids = [Image.open(folder / "sample" / "net_grid.png").tobytes() for folder in (whole, resumed)]
    assert grids[0] == grids[1]
    names = {re.sub(r"_\d{14}", "", path.name) for path in (whole / "sample").iterdir()}
    assert {"net_grid.png", "net_000003_01_5.png"} <= names and len(names) == 7


def _average(folder):
    return torch.load(folder / "net-state" / "ema.pt", weights_only=True)["average"]


@pytest.mark.e2e
def test_the_average_of_a_full_fine_tune_is_saved_drawn_validated_and_resumed(fine_tune, prompts, capfd):
    flags = ["--max_train_steps=4", "--train_text_encoder", "--validation_split=0.3", "--validate_every_n_steps=2"]
    flags += ["--use_ema", "--ema_decay=0.5", "--save_state", "--ema_update_interval=2", "--ema_device=cpu"]
    flags += ["--validate_with_ema", "--sample_with_ema", f"--sample_prompts={prompts}", "--sample_every_n_steps=4"]
    whole = fine_tune("whole", *flags, "--save_every_n_steps=3")
    resumed = whole.parent / "resumed"
    copy_log(whole, resumed)
    fine_tune("resumed", *flags, "--save_ema=last", f"--resume={whole / 'net-step00000003-state'}")
    assert _records(whole) == _records(resumed) and len(_records(whole)[1]) == 2
    assert _equal(_average(whole), _average(resumed))
    live, average = load_file(whole / "net.safetensors"), load_file(whole / "net-ema.safetensors")
    last = load_file(resumed / "net.safetensors")
    assert _equal(average, last) and not _equal(average, live)
    assert not (resumed / "net-ema.safetensors").exists() and (whole / "net-step00000003-ema.safetensors").exists()
    # The file holds what the state does: the weights after an update at step 4, under the names of a checkpoint.
    bias = "model.diffusion_model.time_embed.0.bias"
    assert torch.equal(average[bias], _average(whole)["unet.time_embedding.linear_1.bias"])
    # Parts without an average, such as the VAE, are those of the model.
    assert torch.equal(live["first_stage_model.quant_conv.bias"], average["first_stage_model.quant_conv.bias"])
    assert "no sample pictures this time" not in capfd.readouterr().err
