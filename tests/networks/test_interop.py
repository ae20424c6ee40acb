"""diffusers and peft, as independent readers, load our LoRA file and change the prediction as we do."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from networks import lora
from tests.networks.parts import filled, make_roots, predict, unet_inputs


@pytest.fixture(scope="module")
def network(tiny_roots):
    return filled(lora.create(tiny_roots, dim=4, alpha=2.0, args={"conv_dim": "2"}).eval(), size=0.05)


@pytest.fixture(scope="module")
def diffusers_with_our_file(network, tiny_unet, tiny_text_encoders):
    """Copies of the tiny models into which diffusers has fused our file."""
    from copy import deepcopy

    unet, te1, te2 = (deepcopy(model) for model in (tiny_unet, *tiny_text_encoders))
    pipe = StableDiffusionXLPipeline(
        vae=None, text_encoder=te1, text_encoder_2=te2, tokenizer=None, tokenizer_2=None, unet=unet, scheduler=None
    )
    pipe.load_lora_weights(network.export()[0])
    return pipe


def test_every_delta_that_diffusers_fuses_is_ours(network, diffusers_with_our_file, tiny_unet, tiny_text_encoders):
    pipe = diffusers_with_our_file
    fused = {}
    for part, model in (("unet", pipe.unet), ("te1", pipe.text_encoder), ("te2", pipe.text_encoder_2)):
        for path, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                fused[part, path] = module.get_delta_weight("default_0")
    assert len(fused) == len(network.adapters)
    paths = {}
    for root in make_roots(tiny_unet, *tiny_text_encoders):
        paths |= {id(module): (root.part, path) for path, module in root.module.named_modules()}
    for adapter in network.adapters.values():
        delta = fused[paths[id(adapter.base)]]
        torch.testing.assert_close(delta, adapter.delta_weight(), atol=1e-6, rtol=1e-5)


def test_the_prediction_changes_as_ours(network, diffusers_with_our_file, tiny_unet):
    inputs = unet_inputs()
    base = predict(tiny_unet, inputs)
    network.attach()
    ours = predict(tiny_unet, inputs)
    network.detach()
    theirs = predict(diffusers_with_our_file.unet, inputs)
    assert (ours - base).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_the_text_encoders_change_as_ours(network, diffusers_with_our_file, tiny_text_encoders):
    ids = torch.randint(0, 900, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 999
    network.attach()
    ours = [te(ids, output_hidden_states=True).hidden_states[-2] for te in tiny_text_encoders]
    network.detach()
    pipe = diffusers_with_our_file
    for mine, te, base in zip(ours, (pipe.text_encoder, pipe.text_encoder_2), tiny_text_encoders, strict=True):
        theirs = te(ids, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(mine, base(ids, output_hidden_states=True).hidden_states[-2], atol=1e-3)
