"""The embedded tiny model, loaded once for all tests of this folder; a test that changes it changes it back."""

import pytest

from library.models.bundle import ModelBundle
from library.models.checkpoint import load_bundle


@pytest.fixture(scope="session")
def bundle() -> ModelBundle:
    return load_bundle("tiny")
