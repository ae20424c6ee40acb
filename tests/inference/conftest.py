"""The embedded tiny model, loaded once for all tests of this folder; a test that changes it changes it back."""

import diffusers
import pytest
import torch

from library.inference.adapters import adapter_roots
from library.io.safetensors_file import save
from library.models.bundle import ModelBundle
from library.models.checkpoint import load_bundle, save_diffusers
from networks import lora


@pytest.fixture(scope="session")
def bundle() -> ModelBundle:
    return load_bundle("tiny")


@pytest.fixture(scope="session")
def lora_file(bundle, tmp_path_factory):
    """A LoRA on all three parts and on convolutions whose up weights are noise."""
    g = torch.Generator().manual_seed(0)
    args = {"conv_dim": "2", "conv_alpha": "1.5"}
    network = lora.create(adapter_roots(bundle), dim=4, alpha=3, generator=g, args=args)
    for adapter in network.adapters.values():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.05, generator=g)
    path = tmp_path_factory.mktemp("lora") / "noise.safetensors"
    save(network.export()[0], path)
    return path


@pytest.fixture(scope="module")
def pipeline(bundle, tmp_path_factory):
    """diffusers' own pipeline, from a folder that the library wrote, on the CPU."""
    folder = tmp_path_factory.mktemp("diffusers") / "tiny"
    save_diffusers(bundle, folder)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, force_zeros_for_empty_prompt=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
