"""The tiny models that the tests of this folder share. A test that attaches or merges a network undoes it."""

import pytest
import torch

from tests.networks.parts import FULL_UNET, TINY_UNET, make_roots, make_text_encoders, make_unet


@pytest.fixture(scope="session")
def tiny_unet():
    torch.manual_seed(1)
    return make_unet(**TINY_UNET)


@pytest.fixture(scope="session")
def tiny_text_encoders():
    torch.manual_seed(2)
    return make_text_encoders(32, 48, layers=(3, 3), heads=(2, 3), vocab=1000)


@pytest.fixture(scope="session")
def tiny_roots(tiny_unet, tiny_text_encoders):
    for model in (tiny_unet, *tiny_text_encoders):
        model.requires_grad_(False)
    return make_roots(tiny_unet, *tiny_text_encoders)


@pytest.fixture(scope="session")
def full_roots():
    """SDXL's architecture on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        encoders = make_text_encoders(768, 1280, layers=(12, 32), heads=(12, 20), vocab=49408)
        return make_roots(make_unet(**FULL_UNET), *encoders)
