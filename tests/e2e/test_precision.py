"""Precisions and fused updates through the real scripts: same results, exact resume, and what is written."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.models import fp8
from library.training import prepare
from library.training.trainables.network import NetworkTrainable
from tests.e2e.conftest import copy_log, log_of
from tests.e2e.test_resume import state_tensors


@pytest.mark.e2e
def test_full_bf16_fused_with_text_encoders_resumes_to_the_bit(fine_tune):
    """Weights, float32 optimizer state, and the bits of the stochastic rounding; the resumed half is not fused."""
    flags = ["--mixed_precision=bf16", "--full_bf16", "--train_text_encoder"]
    flags += ["--learning_rate=1e-4", "--max_train_steps=3", "--save_state", "--max_grad_norm=0"]
    whole = fine_tune("whole", *flags, "--fused_backward_pass", "--save_every_n_steps=2")
    stopped = whole / "net-step00000002-state"
    again = whole.parent / "again"
    copy_log(whole, again)
    fine_tune("again", *flags, f"--resume={stopped}")
    expected, got = state_tensors(whole / "net-state"), state_tensors(again / "net-state")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    weights = load_file(whole / "net-state" / "trained.safetensors")
    assert {weights[name].dtype for name in weights if "norm" in name} == {torch.bfloat16}
    moments = torch.load(whole / "net-state" / "optimizer.pt", weights_only=True)["state"][0]
    assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.float32
    losses = [[record["loss"] for record in log_of(folder)] for folder in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.e2e
def test_a_network_on_an_8_bit_base_learns_as_on_a_plain_one_and_says_so(train, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 1 --d 1\n")
    flags = ["--mixed_precision=bf16", "--max_train_steps=2"]
    plain = train("plain", *flags)
    small = train("small", *flags, "--fp8_base", f"--sample_prompts={prompts}", "--sample_every_n_steps=2")
    assert len(list((small / "sample").glob("*.png"))) == 1
    tensors = [load_file(folder / "net.safetensors") for folder in (plain, small)]
    assert tensors[0].keys() == tensors[1].keys()
    assert {t.dtype for t in tensors[1].values()} == {t.dtype for t in tensors[0].values()} == {torch.float32}
    a, b = (torch.cat([t[name].flatten() for name in t if "lora_up" in name]) for t in tensors)
    # Not the same, as the base is not; yet the same direction, for which steps of AdamW are nearly signs.
    assert 0.6 < float(torch.nn.functional.cosine_similarity(a, b, dim=0)) < 0.9999
    with safe_open(small / "net.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_fp8_base"], metadata["ss_fp8_base_unet"], metadata["ss_full_fp16"]) == (
        "True",
        "False",
        "False",
    )


class _Enough(Exception):
    """Ends a run once its models are there."""


@pytest.mark.e2e
def test_no_half_vae_keeps_the_vae_in_float32_in_both_modes(train, fine_tune, monkeypatch):
    def dtypes(start, *flags):
        seen = []

        def look(run):
            seen.extend((run.bundle.unet.dtype, run.bundle.vae.dtype))
            raise _Enough

        monkeypatch.setattr(prepare, "_fill_caches", look)
        with pytest.raises(_Enough):
            start("out", "--mixed_precision=bf16", *flags)
        return tuple(seen)

    wide, half = torch.float32, torch.bfloat16
    assert dtypes(train) == (half, half)
    assert dtypes(train, "--no_half_vae") == (half, wide)
    assert dtypes(fine_tune, "--no_half_vae") == (wide, wide)
    assert dtypes(fine_tune, "--full_bf16") == (half, half)
    assert dtypes(fine_tune, "--full_bf16", "--no_half_vae") == (half, wide)


@pytest.mark.e2e
@pytest.mark.parametrize(("option", "parts"), [("--fp8_base", 3), ("--fp8_base_unet", 1)])
def test_float8_takes_the_text_encoders_too_unless_told_otherwise(train, monkeypatch, option, parts):
    stored = []

    def store(module):
        stored.append(type(module).__name__)
        if len(stored) == parts:
            raise _Enough
        return fp8.Saved(0, 0)

    monkeypatch.setattr(fp8, "store_as_float8", store)
    monkeypatch.setattr(NetworkTrainable, "attach", lambda self, bundle: pytest.fail("before the adapters go on"))
    with pytest.raises(_Enough):
        train("out", "--mixed_precision=bf16", option)
    assert stored == ["UNet2DConditionModel", "CLIPTextModel", "CLIPTextModelWithProjection"][:parts]
