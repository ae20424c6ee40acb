"""The full fine-tune on the tiny model: what moves, what stays, what is written, and that resuming is exact."""

import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.config.block_weights import u_net_block
from library.models import checkpoint
from library.models.embedded import materialised_tiny
from library.training.trainer import Trainer
from tests.e2e.conftest import log_of
from tests.e2e.test_resume import state_tensors

UNET, TE1, TE2, VAE = (
    "model.diffusion_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
    "first_stage_model.",
)


def _changed(path):
    """Names of the tensors of a checkpoint that differ from the tiny model's."""
    before, after = load_file(materialised_tiny()), load_file(path)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name].float(), after[name].float())}


@pytest.mark.e2e
def test_unet_trains_and_everything_else_stays(fine_tune):
    output = fine_tune("out", "--max_train_steps=4", "--save_every_n_steps=2", "--save_last_n_steps=1")
    changed = _changed(output / "net.safetensors")
    assert changed and all(name.startswith(UNET) for name in changed)
    assert len(changed) == sum(name.startswith(UNET) for name in load_file(materialised_tiny()))
    with safe_open(output / "net.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.title"] == "net" and metadata["modelspec.prediction_type"] == "epsilon"
    assert not [key for key in metadata if key.startswith("ss_")]
    assert set(log_of(output)[0]) >= {"loss", "grad_norm", "lr/unet"}


@pytest.mark.e2e
def test_a_block_with_rate_zero_is_bit_identical(fine_tune):
    rates = ["0"] * 23
    rates[8], rates[22] = "1e-3", "1e-4"
    output = fine_tune("out", "--max_train_steps=3", f"--block_lr={','.join(rates)}")
    blocks = {u_net_block(name.removeprefix(UNET)) for name in _changed(output / "net.safetensors")}
    assert blocks == {8, 22}
    assert {name for name in log_of(output)[0] if name.startswith("lr/")} == {"lr/block8", "lr/block22"}


@pytest.mark.e2e
def test_text_encoders_with_their_own_rates(fine_tune):
    flags = ["--max_train_steps=3", "--train_text_encoder", "--gradient_checkpointing"]
    both = _changed(
        fine_tune("both", *flags, "--learning_rate=0", "--learning_rate_te1=1e-4", "--learning_rate_te2=1e-3")
        / "net.safetensors"
    )
    assert {name.startswith((TE1, TE2)) for name in both} == {True}
    # SDXL reads text encoder 1 before its last layer, which therefore stays.
    assert not [name for name in both if "final_layer_norm" in name and name.startswith(TE1)]
    assert any("text_projection" in name for name in both)
    second = _changed(fine_tune("second", *flags, "--learning_rate_te1=0") / "net.safetensors")
    assert {next(p for p in (UNET, TE1, TE2, VAE) if name.startswith(p)) for name in second} == {UNET, TE2}


@pytest.mark.e2e
def test_diffusers_folders_are_written_and_forgotten(fine_tune, tmp_path):
    output = fine_tune(
        "out", "--max_train_steps=3", "--save_model_as=diffusers", "--save_every_n_steps=1", "--save_last_n_steps=1"
    )
    assert sorted(path.name for path in output.iterdir() if (path / "unet").is_dir()) == [
        "net", "net-step00000001", "net-step00000002",
    ]  # fmt: skip
    again = fine_tune("again", f"--pretrained_model_name_or_path={output / 'net'}", "--max_train_steps=1")
    assert (again / "net" / "model_index.json").is_file()


@pytest.mark.e2e
def test_a_unet_from_scratch(fine_tune, tmp_path):
    bundle = checkpoint.load_bundle("tiny", parts=("unet",))
    config = dict(bundle.unet.config)
    config["transformer_layers_per_block"] = [1, 1, 1]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config, default=list))
    flags = [
        "--max_train_steps=2",
        f"--unet_config={path}",
        "--save_precision=bf16",
        "--prediction_type=rectified_flow",
    ]
    first, second = fine_tune("one", *flags), fine_tune("two", *flags)
    assert log_of(first) == log_of(second)  # the seed decides the new weights too
    loaded = checkpoint.load_bundle(str(first / "net.safetensors"))
    assert loaded.prediction_type == "rectified_flow", "what the checkpoint says is about another U-Net"
    assert loaded.arch.unet.depths[-1] == 1 and bundle.arch.unet.depths[-1] > 1
    assert sum(p.numel() for p in loaded.unet.parameters()) < sum(p.numel() for p in bundle.unet.parameters())


@pytest.mark.e2e
def test_resuming_after_sigterm_in_mid_epoch_is_exact(fine_tune, monkeypatch):
    """With both text encoders, averages, 8-bit optimizer state and accumulation."""
    flags = [
        "--max_train_steps=6",
        "--train_text_encoder",
        "--gradient_accumulation_steps=3",
        "--optimizer_type=AdamW8bit",
        "--caption_dropout_rate=0.3",
        "--use_ema",
        "--ema_decay=0.5",
        "--ema_update_interval=2",
        "--save_state",
    ]
    whole = fine_tune("whole", *flags)
    one_step = Trainer._one_step

    def interrupted(trainer, group):
        if trainer.view.progress.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        one_step(trainer, group)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", interrupted)
        stopped = fine_tune("stopped", *flags)
    (state,) = stopped.glob("*-state")
    assert state.name == "net-step00000004-state", "the step that was running is finished; an epoch has three"
    resumed = fine_tune("stopped", *flags, f"--resume={state}")
    expected, got = state_tensors(whole / "net-state"), state_tensors(resumed / "net-state")
    assert expected.keys() == got.keys() and any(".ema" in name or name.startswith("ema") for name in expected)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert log_of(whole) == log_of(resumed)
