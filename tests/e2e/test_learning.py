"""After training on a new concept, generated pictures contain it; before, they did not."""

import pytest

from benchmarks.learning import drawn_share, share_after


@pytest.fixture(scope="module", autouse=True)
def the_model_does_not_know_the_concept(tmp_path_factory):
    assert drawn_share(tmp_path_factory.mktemp("untrained") / "drawn") < 0.02


@pytest.mark.e2e
def test_a_lora_learns_the_new_concept(tmp_path):
    assert share_after(tmp_path, seed=1, steps=120) > 0.05


@pytest.mark.e2e
def test_a_full_fine_tune_in_bf16_learns_the_new_concept(tmp_path):
    assert share_after(tmp_path, seed=1, steps=70, kind="bf16") > 0.05
