"""What every test gets: one thread, no network, a cache folder of the run's own, deterministic hypothesis."""

import gc
import os
import shutil
import tempfile

import pytest
from hypothesis import settings

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Before torch is imported: a sum's order, and so its last bit, depends on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not IS_WORKER:
    # Workers and the scripts that tests start inherit it, so the tiny model is written out once per run.
    os.environ["SDXL_SUITE_CACHE"] = tempfile.mkdtemp(prefix="sdxl-suite-tests-")

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order and skip.

    Long files come first, so that what is left for the end is short and all workers end together. Tests marked `gpu`
    are skipped on a machine without CUDA; torch is asked only when there are any.
    """
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What the imports have made stays for good: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Remove the run's cache folder, in the process that made it."""
    if not IS_WORKER:
        shutil.rmtree(os.environ["SDXL_SUITE_CACHE"], ignore_errors=True)
