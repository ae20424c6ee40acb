"""The U-Net's call, checkpointing, attention, and the family's shape."""

import inspect

import pytest
import torch

from library.diffusion.conditioning import TextCond
from library.errors import UserError
from library.models import attention, memory
from library.models.bundle import ModelBundle
from library.models.families import sdxl
from library.models.family import ModelFamily


def _inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, TextCond, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = TextCond(torch.randn(2, 77, 80, generator=generator), torch.randn(2, 48, generator=generator))
    sizes = torch.tensor([[128, 96, 0, 7, 128, 96], [1024, 768, 4, 0, 96, 128]], dtype=torch.float32)
    return torch.randn(2, 4, 16, 12, generator=generator), torch.tensor([3, 900]), text, sizes


def test_every_function_of_the_family_is_there():
    functions = [name for name in vars(ModelFamily) if not name.startswith("_")]
    assert len(functions) == 8
    for name in functions:
        ours, theirs = inspect.signature(getattr(sdxl, name)), inspect.signature(getattr(ModelFamily, name))
        promised = [p for p in theirs.parameters if p not in ("self", "options")]
        assert [p for p in ours.parameters if p in promised] == promised, name


@torch.no_grad()
def test_size_ids_are_not_rounded_in_half_precision(half_bundle: ModelBundle):
    """bfloat16 cannot tell 1023 from 1024; the embedding of the sizes must."""
    x, t, text, sizes = _inputs()
    captured = []
    hook = half_bundle.unet.add_time_proj.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    sdxl.predict(half_bundle.unet, x, t, text, sizes + 4095)
    hook.remove()
    assert captured[0].dtype == torch.float32 and captured[0].max() == 1024 + 4095


@torch.no_grad()
def test_prediction_has_the_unets_dtype_and_the_latents_shape(half_bundle: ModelBundle, bundle: ModelBundle):
    half, full = (sdxl.predict(each.unet, *_inputs()) for each in (half_bundle, bundle))
    assert half.dtype == torch.float16 and full.dtype == torch.float32 and full.shape == (2, 4, 16, 12)
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.05)


@torch.no_grad()
def test_every_condition_has_an_effect(bundle: ModelBundle):
    x, t, text, sizes = _inputs()
    base = sdxl.predict(bundle.unet, x, t, text, sizes)
    others = [
        (x, t + 50, text, sizes),
        (x, t, TextCond(text.hidden_BTD * 1.1, text.pooled_BP), sizes),
        (x, t, TextCond(text.hidden_BTD, text.pooled_BP * 1.1), sizes),
        *[(x, t, text, sizes + 64 * torch.eye(6)[column]) for column in range(6)],
    ]
    for inputs in others:
        assert (sdxl.predict(bundle.unet, *inputs) - base).abs().max() > 1e-5


def test_checkpointing_leaves_gradients_as_they_are(fresh_bundle: ModelBundle):
    unet = fresh_bundle.unet.requires_grad_(True).train()

    def gradients() -> list[torch.Tensor]:
        unet.zero_grad()
        sdxl.predict(unet, *_inputs()).square().mean().backward()
        return [parameter.grad.clone() for parameter in unet.parameters() if parameter.grad is not None]

    plain = gradients()
    calls = []
    unet.mid_block.resnets[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    memory.enable_gradient_checkpointing(fresh_bundle, text_encoders=False)
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True))
    assert unet.is_gradient_checkpointing and not fresh_bundle.text_encoder_1.is_activation_checkpointing


def test_freezing_takes_every_part_out_of_training(fresh_bundle: ModelBundle):
    fresh_bundle.unet.requires_grad_(True).train()
    fresh_bundle.vae = None
    memory.freeze(fresh_bundle)
    assert not fresh_bundle.unet.training
    assert not any(parameter.requires_grad for parameter in fresh_bundle.unet.parameters())


def test_xformers_is_refused_where_it_cannot_work(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch):
    attention.configure(bundle.unet, xformers=False, device="cpu")
    with pytest.raises(UserError, match="needs a CUDA device"):
        attention.configure(bundle.unet, xformers=True, device="cpu")
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        attention.configure(bundle.unet, xformers=True, device="cuda")
