"""What an update allocates, traced, against arithmetic: fused updates and bfloat16 save what they promise."""

import pytest

from benchmarks.memory import CASES, measure

LAYERS = 8
TRACED = {case.name: case for case in CASES if case.optimizer != "AdamW8bit"}  # its CPU kernels take room of their own


@pytest.mark.parametrize("name", TRACED)
def test_bytes_per_parameter_are_what_arithmetic_says(name):
    case = TRACED[name]
    got = measure(case, width=256, layers=LAYERS)
    assert got == pytest.approx(case.bytes_per_parameter(LAYERS), abs=0.15)
