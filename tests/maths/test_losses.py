"""Elementwise losses and their reduction."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from library import plugins
from library.diffusion import losses
from library.diffusion.losses import l2
from library.diffusion.reduce import per_sample, weighted_mean

LOSSES = plugins.list_plugins(Path(losses.__path__[0]))


def test_l2_equals_torch() -> None:
    pred, target = torch.randn(2, 3, 4, 5, 6)
    expected = torch.nn.functional.mse_loss(pred, target, reduction="none")
    torch.testing.assert_close(l2.elementwise(pred, target), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_elementwise_float32_and_zero_only_at_the_target(name: str) -> None:
    loss = plugins.load_plugin("library.diffusion.losses", name)
    target = torch.randn(2, 4, 3, 3).half()
    out = loss.elementwise(target + 1, target)
    assert out.shape == target.shape and out.dtype == torch.float32 and bool((out > 0).all())
    assert torch.count_nonzero(loss.elementwise(target, target)) == 0


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
