"""Masks in the loss: what they weigh, and what they must leave alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.diffusion.losses import l2
from library.diffusion.masks import apply_mask, mask_cells
from library.diffusion.reduce import per_sample


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_cell_is_the_mean_of_its_pixels():
    mask_HW = uniform(16, 24)
    cells_hw = mask_cells(mask_HW)
    assert cells_hw.shape == (2, 3) and cells_hw.dtype == torch.float32
    assert cells_hw[1, 2] == pytest.approx(mask_HW[8:16, 16:24].mean().item(), rel=1e-6)
    reference = torch.nn.functional.interpolate(mask_HW[None, None], (2, 3), mode="area")  # what sd-scripts does
    assert torch.allclose(cells_hw, reference[0, 0])


@given(st.integers(0, 10**6))
def test_the_mirrored_mask_has_mirrored_cells_bit_for_bit(seed):
    levels_HW = torch.randint(0, 256, (16, 24), generator=torch.Generator().manual_seed(seed)) / 255
    assert torch.equal(mask_cells(levels_HW.flip(-1)), mask_cells(levels_HW).flip(-1))


@pytest.mark.parametrize("by_area", [False, True])
def test_a_mask_of_ones_changes_no_bit(by_area):
    loss_BChw = noise(3, 4, 6, 7).square()
    ones_B1hw = mask_cells(torch.ones(48, 56)).expand(3, 1, 6, 7)
    assert torch.equal(apply_mask(loss_BChw, ones_B1hw, by_area=by_area), loss_BChw)


@pytest.mark.parametrize("by_area", [False, True])
def test_what_is_outside_the_mask_has_no_gradient(by_area):
    prediction, target = noise(2, 4, 6, 7).requires_grad_(), noise(2, 4, 6, 7, seed=1)
    mask_B1hw = uniform(2, 1, 6, 7) + 0.1
    mask_B1hw[:, :, 2:4, 1:5] = 0
    loss = per_sample(apply_mask(l2.elementwise(prediction, target), mask_B1hw, by_area=by_area)).sum()
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert torch.equal(gradient == 0, (mask_B1hw == 0).expand_as(gradient))


def test_without_normalising_half_a_mask_is_half_a_loss():
    loss_BChw = torch.full((1, 4, 2, 2), 3.0)
    mask_B1hw = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    assert per_sample(apply_mask(loss_BChw, mask_B1hw, by_area=False)).tolist() == [1.5]


def test_by_area_the_loss_is_the_mean_over_what_the_mask_shows():
    loss_BChw = noise(2, 4, 6, 6).square()
    mask_B1hw = torch.zeros(2, 1, 6, 6)
    mask_B1hw[0, :, :2, :3] = 1
    loss_B = per_sample(apply_mask(loss_BChw, mask_B1hw, by_area=True))
    assert loss_B[0] == pytest.approx(loss_BChw[0, :, :2, :3].mean().item(), rel=1e-5)
    assert loss_B[1] == 0
    faint_B = per_sample(apply_mask(loss_BChw, mask_B1hw * 0.25, by_area=True))
    assert torch.allclose(faint_B, loss_B)
