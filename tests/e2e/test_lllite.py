"""sdxl_train_control_net_lllite.py as users start it: exact resume, ranks, caches, its own options, bad input."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import sdxl_train_control_net_lllite
from library.config.lllite import LlliteOptions
from library.training import launch
from library.training.prepare import prepare
from tests.e2e.conftest import copy_log, full_arguments, log_of
from tests.e2e.test_resume import state_tensors
from tests.ranks import two_ranks

pytestmark = pytest.mark.e2e


@pytest.fixture
def conditions(pictures) -> Path:
    """A condition for each picture, half as large, in a folder beside the pictures'."""
    folder = pictures.parent / "edges"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for path in (pictures / "2_thing").glob("*.png"):
        w, h = Image.open(path).size
        Image.fromarray(rng.integers(0, 255, (h // 2, w // 2, 3), dtype=np.uint8)).save(folder / path.name)
    return folder


def flags_for(pictures: Path, conditions: Path, output: Path, *flags: str) -> list[str]:
    own = [f"--conditioning_data_dir={conditions}", "--learning_rate=1e-2", "--dataset_repeats=2"]
    return full_arguments(pictures / "2_thing", output, *own, *flags)


@pytest.fixture
def follow(tmp_path, pictures, conditions):
    """follow(output_name, *extra flags) runs the script's main and returns the output folder."""

    def run(name: str, *flags: str) -> Path:
        output = tmp_path / name
        assert sdxl_train_control_net_lllite.main(flags_for(pictures, conditions, output, *flags)) == 0
        return output

    return run


def test_resume_is_exact_with_all_that_looks_at_the_run_and_the_base_stays(follow, conditions, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a red circle --cn {conditions / 'p0.png'} --w 64 --h 64 --s 1 --d 1\n")
    flags = ["--max_train_steps=4", "--network_dropout=0.1", "--random_crop", "--flip_aug", "--save_state", "--use_ema"]
    flags += ["--caption_dropout_rate=0.3", "--gradient_checkpointing", "--validation_split=0.2"]
    flags += ["--validate_every_n_steps=2", "--validation_timesteps=1", "--max_validation_steps=1"]
    flags += [f"--sample_prompts={prompts}", "--sample_every_n_steps=2"]
    bundles, copies = [], []

    def spying(*arguments):
        run = prepare(*arguments)
        bundles.append(run.bundle)
        copies.append(copy.deepcopy([run.bundle.unet.state_dict(), run.bundle.text_encoder_1.state_dict()]))
        return run

    monkeypatch.setattr(launch, "prepare", spying)
    whole = follow("whole", *flags, "--save_every_n_steps=2", "--sample_at_first")
    copy_log(whole, whole.parent / "resumed")
    resumed = follow("resumed", *flags, f"--resume={whole / 'net-step00000002-state'}")
    expected, got = state_tensors(whole / "net-state"), state_tensors(resumed / "net-state")
    assert expected.keys() == got.keys() and len(expected) > 1000
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert log_of(whole) == log_of(resumed)
    for before, module in zip(copies[0], (bundles[0].unet, bundles[0].text_encoder_1), strict=True):
        after = module.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    first, middle, last = (path.read_bytes() for path in sorted((whole / "sample").glob("*.png")))
    assert len({first, middle, last}) == 3, "samples show what is trained"
    with safe_open(whole / "net.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
    assert (header["ss_network_module"], header["ss_network_dim"]) == ("networks.control_net_lllite", "64")
    assert header["ss_network_args"] == '{"cond_emb_dim": 32}'
    assert all(key.startswith("lllite_unet_") for key in load_file(whole / "net.safetensors"))


def test_two_processes_equal_one_with_twice_the_batch(follow, pictures, conditions, tmp_path):
    flags = ["--max_train_steps=3", "--random_crop", "--flip_aug"]
    one, two = follow("one", *flags, "--train_batch_size=4"), tmp_path / "two"
    argv = flags_for(pictures, conditions, two, *flags, "--train_batch_size=2")
    two_ranks("sdxl_train_control_net_lllite", argv, tmp_path)
    for first, second in zip(log_of(one), log_of(two), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=2e-3)
    expected, got = load_file(one / "net.safetensors"), load_file(two / "net.safetensors")
    difference = torch.stack([(expected[name] - got[name]).abs().max() for name in expected])
    assert float(difference.quantile(0.9)) < 2e-3 < max(float(t.abs().max()) for k, t in expected.items() if "up" in k)


def test_caches_change_nothing_and_the_networks_own_options_act(follow, pictures, conditions):
    own = {"conditioning_data_dir", "cond_emb_dim", "network_dim", "network_weights", "network_dropout"}
    assert set(LlliteOptions.options()) == own, "each of them is set below"
    flags = ["--max_train_steps=2", "--flip_aug", "--log_every_n_steps=1"]
    plain = follow("plain", *flags)
    cached = follow("cached", *flags, "--cache_latents", "--cache_latents_moments", "--cache_text_encoder_outputs")
    for first, second in zip(log_of(plain), log_of(cached), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=2e-2)
    small = follow("small", *flags, "--cache_latents_to_disk", "--cond_emb_dim=6", "--network_dim=5")
    tensors = load_file(small / "net.safetensors")
    name = "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{name}.mid.0.weight"].shape == (5, 11)
    start = [*flags, "--cache_latents_to_disk", f"--network_weights={small / 'net.safetensors'}"]
    again = follow("again", *start, "--save_precision=fp16")
    assert log_of(again)[0]["loss"] != log_of(small)[0]["loss"], "it goes on from the file"
    more = load_file(again / "net.safetensors")
    assert {key: value.shape for key, value in more.items()} == {key: value.shape for key, value in tensors.items()}
    assert more[f"{name}.up.0.weight"].dtype == torch.float16
    dropped = follow("dropped", *start, "--network_dropout=0.5")
    assert log_of(dropped)[0]["loss"] != log_of(again)[0]["loss"]
    for path in conditions.glob("*.png"):
        Image.new("RGB", Image.open(path).size, "white").save(path)
    white = log_of(follow("white", *start))
    assert white[0]["loss"] != log_of(again)[0]["loss"], "conditions are read beside cached latents"


def test_what_cannot_be_is_told_before_the_model_is_loaded(follow, pictures, conditions, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("library.models.checkpoint.load_bundle", None)

    def told(*flags: str) -> str:
        output = tmp_path / "refused"
        assert sdxl_train_control_net_lllite.main(flags_for(pictures, conditions, output, *flags)) == 2
        return capfd.readouterr().err

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    assert 'prompt "a red circle" has no control image' in told(f"--sample_prompts={prompts}", "--sample_at_first")
    from safetensors.torch import save_file

    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    assert "it is a LoRA" in told(f"--network_weights={tmp_path / 'lora.safetensors'}")
    name = "lllite_unet_x"
    small = {f"{name}.conditioning1.0.weight": torch.ones(4, 3, 4, 4), f"{name}.down.0.weight": torch.ones(6, 32)}
    save_file(small, tmp_path / "small.safetensors")
    weights = f"--network_weights={tmp_path / 'small.safetensors'}"
    assert "the file has network_dim 6, and 9 is asked for" in told(weights, "--network_dim=9")
    name = "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    other = {f"{name}.conditioning1.0.weight": torch.ones(4, 3, 4, 4), f"{name}.down.0.weight": torch.ones(6, 1280)}
    other_place = tmp_path / "other.safetensors"
    save_file(other, other_place)
    text = told(f"--network_weights={other_place}")
    assert f"{name} is made for a layer of 1280 numbers, this model's has 80" in text and "other.safetensors" in text
    save_file({key.replace("blocks_0", "blocks_9"): value for key, value in other.items()}, other_place)
    assert "1 of its 1 modules are not in this model" in told(f"--network_weights={other_place}")
    Image.new("RGB", (64, 8)).save(conditions / "p0.png")
    for path in conditions.glob("p[1-6].png"):
        path.unlink()
    text = told()
    assert "no image is left to train on" in text
    assert "it has no condition image: there is no" in text
    assert "is 64x8, another aspect ratio than the image's 64x64" in text
