"""Drawing on a device other than the CPU: every input of the U-Net arrives there."""

import pytest
import torch

from library.config.choices import SAMPLERS, split_sampler
from library.diffusion.conditioning import TextCond
from library.inference.denoise import denoise
from library.inference.samplers import make_scheduler
from library.models import checkpoint
from library.models.families import sdxl


def test_timesteps_of_a_scheduler_follow_the_latents():
    """The meta device stands in for a GPU: it refuses CPU inputs in the same way, and computes nothing."""
    unet = checkpoint.load_bundle("tiny", parts=("unet",)).unet.to("meta")
    width, pooled = unet.config.cross_attention_dim, 48
    text = TextCond(torch.zeros(2, 77, width, device="meta"), torch.zeros(2, pooled, device="meta"))
    out = sdxl.predict(unet, torch.zeros(2, 4, 8, 8, device="meta"), torch.tensor([1, 2]), text, torch.zeros(2, 6))
    assert out.shape == (2, 4, 8, 8) and out.is_meta


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in SAMPLERS if split_sampler(name)[1] != "exponential"])
def test_samplers_keep_the_latents_on_their_device(name):
    scheduler = make_scheduler(name, prediction_type="epsilon", steps=4)
    noise = torch.zeros(2, 4, 8, 8, device="meta")
    result = denoise(lambda x, t: x * 1.0, noise, scheduler, generators=[torch.Generator(), torch.Generator()])
    assert result.is_meta and result.shape == noise.shape and result.dtype == torch.float32
