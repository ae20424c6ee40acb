"""After training on a new concept, generated pictures contain it; before, they did not."""

import pytest

from benchmarks.learning import before_and_after


@pytest.mark.e2e
def test_a_lora_learns_the_new_concept(tmp_path):
    before, after = before_and_after(tmp_path, seed=1, steps=200)
    assert before < 0.02
    assert after > 0.05


@pytest.mark.e2e
def test_a_full_fine_tune_in_bf16_learns_the_new_concept(tmp_path):
    before, after = before_and_after(tmp_path, seed=1, steps=100, kind="bf16")
    assert before < 0.02
    assert after > 0.05
