"""The tiny models that the tests of this folder share. A test that attaches or merges a network undoes it."""

import pytest
import torch

from tests.networks.parts import TINY_UNET, make_roots, make_text_encoders, make_unet


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
