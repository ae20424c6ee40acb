"""The real LoRA trainer on the tiny model: what it writes, what it refuses, what it survives."""

import json
import os
import signal
import threading

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import sdxl_train_network
from tests.e2e.conftest import log_of


def _metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.e2e
def test_files_names_and_metadata(train):
    output = train(
        "out",
        "--max_train_epochs=3",
        "--save_every_n_epochs=1",
        "--save_last_n_epochs=1",
        "--save_precision=fp16",
        "--network_args",
        "conv_dim=2",
        "conv_alpha=1",
        "--training_comment=hello",
        "--cache_latents",
    )
    assert sorted(p.name for p in output.glob("*.safetensors")) == ["net-000002.safetensors", "net.safetensors"]
    tensors = load_file(output / "net.safetensors")
    parts = {name.split("_")[1] for name in tensors}
    assert parts == {"unet", "te1", "te2"}
    assert tensors["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight"].dtype == torch.float16
    assert tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"].shape == ()
    found = _metadata(output / "net.safetensors")
    assert found["ss_network_module"] == "networks.lora"
    assert found["ss_network_dim"] == "4"
    assert json.loads(found["ss_network_args"])["conv_dim"] == "2"
    assert found["ss_training_comment"] == "hello"
    assert found["ss_num_train_images"] == "14"
    assert found["ss_epoch"] == "3"
    assert found["ss_base_model_version"] == "sdxl_base_v1-0"
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert found["modelspec.prediction_type"] == "epsilon"
    assert len(found["sshs_model_hash"]) == 64
    assert found["ss_sd_model_name"] == "tiny" and len(found["ss_new_sd_model_hash"]) == 64
    assert json.loads(found["ss_tag_frequency"])
    assert log_of(output)[-1]["step"] == int(found["ss_steps"])


@pytest.mark.e2e
def test_no_metadata_keeps_what_a_loader_needs(train):
    found = _metadata(train("out", "--max_train_steps=1", "--no_metadata") / "net.safetensors")
    assert {key for key in found if key.startswith("ss_")} <= {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }


@pytest.mark.e2e
def test_unet_only_with_cached_text_and_caption_dropout_samples_and_resumed_weights(train, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2 --d 1\n# a comment\na blue square --w 64 --h 64 --s 2 --d 2\n")
    flags = [
        "--network_train_unet_only",
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        "--caption_dropout_rate=0.2",
        f"--sample_prompts={prompts}",
    ]
    output = train("out", *flags, "--max_train_steps=4", "--sample_every_n_steps=2", "--sample_at_first")
    pictures = sorted((output / "sample").glob("*.png"))
    assert len(pictures) == 6
    assert all(Image.open(p).size == (64, 64) for p in pictures)
    without = train("quiet", *flags, "--max_train_steps=4")
    assert log_of(output) == log_of(without), "sample pictures must not change training"
    tensors = load_file(output / "net.safetensors")
    assert all(name.startswith("lora_unet_") for name in tensors)
    again = train(
        "again", *flags, "--max_train_steps=1", f"--network_weights={output / 'net.safetensors'}", "--dim_from_weights"
    )
    assert load_file(again / "net.safetensors").keys() == tensors.keys()


@pytest.mark.e2e
def test_partial_batches_count_by_their_samples(train):
    """One step over the whole epoch: the mean is over its 14 samples, however they are cut into micro-batches."""
    flags = ["--max_train_steps=1", "--gradient_accumulation_steps=99"]
    singles = train("singles", *flags, "--train_batch_size=1")
    # buckets of 6, 4 and 4 samples: micro-batches of 3, 3, 3, 1, 3 and 1
    threes = train("threes", *flags, "--train_batch_size=3")
    (expected,), (got,) = log_of(singles), log_of(threes)
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-3)


@pytest.mark.e2e
@pytest.mark.parametrize("optimizer", ["AdamW8bit", "Adafactor", "torch.optim.NAdam"])
def test_other_optimizers_train(train, optimizer):
    output = train("out", "--max_train_steps=2", f"--optimizer_type={optimizer}", "--mixed_precision=bf16")
    values = load_file(output / "net.safetensors")
    assert any(v.abs().max() > 0 for name, v in values.items() if "lora_up" in name)
    assert all(torch.isfinite(v).all() for v in values.values())


@pytest.mark.e2e
def test_sigterm_finishes_the_step_and_saves_a_state_that_resumes(train):
    timer = threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGTERM))
    previous = signal.getsignal(signal.SIGTERM)
    timer.start()
    try:
        output = train("out", "--max_train_steps=100000")
    finally:
        timer.cancel()
    assert signal.getsignal(signal.SIGTERM) == previous
    (state,) = output.glob("net-step*-state")
    step = int(state.name.split("step")[1].split("-")[0])
    assert (output / f"net-step{step:08d}.safetensors").exists()
    assert not (output / "net.safetensors").exists()
    train("out", f"--max_train_steps={step + 1}", f"--resume={state}")
    assert [record["step"] for record in log_of(output)] == list(range(1, step + 2))


@pytest.mark.e2e
def test_one_bad_image_costs_that_image_only(train, pictures, capfd):
    (pictures / "2_thing" / "bad.png").write_bytes(b"not an image")
    (pictures / "2_thing" / "bad.txt").write_text("a caption")
    train("out", "--max_train_steps=1", "--cache_latents")
    assert "bad.png" in capfd.readouterr().err


@pytest.mark.e2e
def test_problems_are_reported_together_with_exit_code_2(capsys, tmp_path):
    code = sdxl_train_network.main(
        [
            f"--pretrained_model_name_or_path={tmp_path / 'no.safetensors'}",
            f"--train_data_dir={tmp_path / 'nowhere'}",
            "--network_module=networks.lora",
            "--output_dir=out",
            "--learning_rate=abc",
            "--network_args",
            "conv_dims=4",
        ]
    )
    assert code == 2
    text = capsys.readouterr().err
    assert "no.safetensors" in text and "nowhere" in text and "abc" in text and "conv_dim" in text


@pytest.mark.e2e
def test_sample_pictures_that_cannot_be_written_do_not_end_the_run(train, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sample").write_text("a file is in the way")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2\n")
    output = train("out", "--max_train_steps=2", f"--sample_prompts={prompts}", "--sample_every_n_steps=1")
    assert "no sample pictures this time" in capfd.readouterr().err
    assert (output / "net.safetensors").exists()
