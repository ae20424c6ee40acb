"""The tiny SDXL, loaded once per session: read it, never change it (ask for `fresh_bundle` instead)."""

from pathlib import Path

import pytest
import torch

from library.models import checkpoint
from library.models.bundle import ModelBundle

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_path() -> Path:
    """The tiny SDXL's single file."""
    return checkpoint.resolve_checkpoint("tiny")


@pytest.fixture(scope="session")
def bundle(tiny_path: Path) -> ModelBundle:
    """The tiny SDXL in float32, shared by all tests."""
    return checkpoint.load_bundle("tiny")


@pytest.fixture
def fresh_bundle(tiny_path: Path) -> ModelBundle:
    """A tiny SDXL of the test's own."""
    return checkpoint.load_bundle("tiny")


@pytest.fixture(scope="session")
def half_bundle(tiny_path: Path) -> ModelBundle:
    """The tiny SDXL in float16, as it is stored."""
    return checkpoint.load_bundle("tiny", dtype=torch.float16)


@pytest.fixture(scope="session")
def folder(half_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL as a diffusers folder in float16."""
    path = tmp_path_factory.mktemp("models") / "folder"
    checkpoint.save_diffusers(half_bundle, path)
    return path
