"""Elementwise losses and their reduction."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from library import plugins
from library.diffusion import losses
from library.diffusion.huber import HuberThreshold
from library.diffusion.losses import l2
from library.diffusion.reduce import per_sample, weighted_mean
from library.diffusion.schedule import NoiseSchedule
from library.training.objective import takes_threshold

LOSSES = plugins.list_plugins(Path(losses.__path__[0]))


def test_l2_equals_torch() -> None:
    pred, target = torch.randn(2, 3, 4, 5, 6)
    expected = torch.nn.functional.mse_loss(pred, target, reduction="none")
    torch.testing.assert_close(l2.elementwise(pred, target), expected)


def _score(name: str, pred: torch.Tensor, target: torch.Tensor, c: float = 0.3) -> torch.Tensor:
    """The elementwise loss of a plugin, with the threshold `c` where it takes one."""
    loss = plugins.load_plugin("library.diffusion.losses", name).elementwise
    threshold = torch.full((len(pred), *[1] * (pred.ndim - 1)), c)
    return loss(pred, target, threshold) if takes_threshold(loss) else loss(pred, target)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_elementwise_float32_and_zero_only_at_the_target(name: str) -> None:
    target = torch.randn(2, 4, 3, 3).half()
    out = _score(name, target + 1, target)
    assert out.shape == target.shape and out.dtype == torch.float32 and bool((out > 0).all())
    assert torch.count_nonzero(_score(name, target, target)) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_grows_with_the_error_and_is_even(name: str) -> None:
    d = torch.linspace(0, 30, 400)[:, None]
    up, down = (_score(name, sign * d, torch.zeros_like(d)) for sign in (1, -1))
    assert torch.equal(up, down) and bool((up.diff(dim=0) > 0).all())


@pytest.mark.parametrize("c", [0.01, 0.3, 4.0])
def test_huber_losses_have_their_closed_form(c: float) -> None:
    pred, target = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    root = ((pred - target) ** 2 + c**2).sqrt() - c
    torch.testing.assert_close(_score("huber", pred, target, c).double(), 2 * c * root, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(_score("smooth_l1", pred, target, c).double(), 2 * root, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(_score("l1", pred, target).double(), (pred - target).abs(), rtol=1e-5, atol=1e-6)


def test_huber_losses_are_quadratic_near_and_linear_far() -> None:
    small, large, zero = torch.tensor([[1e-4]]), torch.tensor([[1e4]]), torch.zeros(1, 1)
    assert _score("huber", small, zero, 0.5).item() == pytest.approx(1e-8, rel=1e-4)
    assert _score("smooth_l1", small, zero, 0.5).item() == pytest.approx(1e-8 / 0.5, rel=1e-4)
    assert _score("huber", large, zero, 0.5).item() == pytest.approx(2 * 0.5 * (1e4 - 0.5), rel=1e-6)
    assert _score("smooth_l1", large, zero, 0.5).item() == pytest.approx(2 * (1e4 - 0.5), rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2, 0.2, 0.2]),
        ("exponential", [2.0, 2 * math.sqrt(0.1), 2 * 0.1**0.999]),
        # (1 - c) / (1 + sigma)^2 + c with sigma^2 = 1 / snr of decimal arithmetic: 1175.4706, 0.38185044, 0.0046819167
        (
            "snr",
            [2 * (0.9 / (1 + snr**-0.5) ** 2 + 0.1) for snr in (1175.4706, 0.38185044, 0.0046819167)],
        ),
    ],
)
def test_the_threshold_follows_its_schedule_and_the_scale_acts_in_each(schedule: str, expected: list[float]) -> None:
    t = torch.tensor([0, 500, 999])
    found = HuberThreshold(0.1, 2.0, schedule).at(t, NoiseSchedule.scaled_linear())
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_threshold_without_any_signal_is_its_base() -> None:
    alphas = NoiseSchedule.scaled_linear().alphas_cumprod_N.clone()
    alphas[-1] = 0
    found = HuberThreshold(0.1, 1.0, "snr").at(torch.tensor([999]), NoiseSchedule.variance_preserving(alphas))
    assert found.tolist() == pytest.approx([0.1], rel=1e-12)


def test_l2_of_half_precision_does_not_overflow() -> None:
    assert l2.elementwise(torch.tensor([300.0]).half(), torch.tensor([-300.0]).half()).item() == 360000.0


def test_per_sample_averages_each_row_alone() -> None:
    loss = torch.stack([torch.full((4, 2, 3), 1.0), torch.full((4, 2, 3), 5.0)])
    loss[1, 0, 0, 0] += 24
    assert per_sample(loss).tolist() == [1.0, 6.0]


def test_weighted_mean_divides_by_samples_not_by_weights() -> None:
    loss = torch.tensor([2.0, 4.0, 100.0])
    assert weighted_mean(loss, torch.tensor([1.0, 0.5, 0.0]), 2).item() == 2.0


def test_padding_rows_change_neither_loss_nor_gradient() -> None:
    loss = torch.tensor([2.0, 4.0, math.nan], requires_grad=True)
    mean = weighted_mean(loss, torch.tensor([1.0, 1.0, 0.0]), 2)
    mean.backward()
    assert mean.item() == 3.0
    assert loss.grad.tolist() == [0.5, 0.5, 0.0]


def test_a_batch_of_nothing_but_padding_is_refused() -> None:
    with pytest.raises(AssertionError):
        weighted_mean(torch.ones(2), torch.zeros(2), 0)
