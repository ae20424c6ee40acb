"""Training targets and the way back to the clean latent."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.config.choices import PREDICTION_TYPES
from library.diffusion.schedule import NoiseSchedule
from library.diffusion.targets import PredictionType, to_x0, training_target

SCHEDULE = NoiseSchedule.scaled_linear()
ZERO_SNR = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
FLOW = NoiseSchedule.rectified_flow(shift=2.5)
CASES = [("epsilon", SCHEDULE), ("v_prediction", SCHEDULE), ("v_prediction", ZERO_SNR), ("rectified_flow", FLOW)]


@pytest.mark.parametrize(("prediction_type", "schedule"), CASES)
@given(seed=st.integers(0, 2**31), t=st.lists(st.integers(0, 999), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_perfect_prediction_gives_back_the_clean_latent(prediction_type, schedule, seed: int, t: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, len(t), 4, 3, 5, generator=generator, dtype=torch.float64)
    t_B = torch.tensor(t)
    target = training_target(prediction_type, schedule=schedule, x0=x0, noise=noise, t=t_B)
    xt = schedule.add_noise(x0, noise, t_B)
    recovered = to_x0(prediction_type, schedule=schedule, xt=xt, prediction=target, t=t_B)
    torch.testing.assert_close(recovered, x0, rtol=0, atol=1e-9)


def test_epsilon_target_is_the_noise_itself() -> None:
    noise = torch.randn(2, 4, 2, 2)
    target = training_target(
        "epsilon", schedule=SCHEDULE, x0=torch.ones_like(noise), noise=noise, t=torch.tensor([1, 2])
    )
    assert target is noise


def test_velocity_target_is_the_noise_early_and_minus_the_latent_late() -> None:
    x0, noise = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 5.0)
    v = training_target("v_prediction", schedule=SCHEDULE, x0=x0, noise=noise, t=torch.tensor([0, 999]))
    assert v.flatten().tolist() == pytest.approx([5.0, -3.0], abs=0.4)


def test_the_flow_is_the_slope_of_the_line_from_picture_to_noise() -> None:
    x0, noise = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64)
    t_B, later_B = torch.tensor([100, 700]), torch.tensor([101, 999])
    flow = training_target("rectified_flow", schedule=FLOW, x0=x0, noise=noise, t=t_B)
    rise = FLOW.add_noise(x0, noise, later_B) - FLOW.add_noise(x0, noise, t_B)
    torch.testing.assert_close(rise / (FLOW.sigma(later_B, x0) - FLOW.sigma(t_B, x0)), flow, rtol=0, atol=1e-9)


def test_the_options_name_these_prediction_types() -> None:
    assert get_args(PredictionType) == PREDICTION_TYPES


def test_an_unknown_prediction_type_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="sample"):
        training_target("sample", schedule=SCHEDULE, x0=x, noise=x, t=torch.tensor([0]))
    with pytest.raises(ValueError, match="sample"):
        to_x0("sample", schedule=SCHEDULE, xt=x, prediction=x, t=torch.tensor([0]))
