"""Frozen weights in float8: what they cost, how exact they are, and that gradients and adapters pass through them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from library.models import fp8
from library.models.bundle import ModelBundle


def _source(seed=0):
    return torch.Generator().manual_seed(seed)


def _linear(dtype=torch.bfloat16, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 32, bias=bias)).to(dtype).requires_grad_(False)


def _convolution(dtype=torch.bfloat16, **geometry):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 12, 3, **geometry)).to(dtype).requires_grad_(False)


GEOMETRIES = [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}, {"groups": 4, "bias": False}]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_computes_with_the_stored_weight_forward_and_backward(dtype, bias):
    module = _linear(dtype, bias)
    fp8.store_as_float8(module)
    weight, offset = fp8.wide_weight(module[0]), module[0].bias
    x = torch.randn(4, 7, 48, generator=_source()).to(dtype).requires_grad_()
    want = F.linear(x, weight, offset)
    grad = torch.randn(want.shape, generator=_source(1)).to(dtype)
    (expected,) = torch.autograd.grad(want, x, grad)
    got = module(x)
    assert got.dtype == dtype and torch.equal(got, want)
    # The same product, with batch dimensions folded differently.
    torch.testing.assert_close(torch.autograd.grad(got, x, grad)[0], expected)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_convolution_computes_with_the_stored_weight_forward_and_backward(geometry):
    module = _convolution(torch.float32, **geometry)
    fp8.store_as_float8(module)
    conv = module[0]
    x = torch.randn(2, 8, 11, 9, generator=_source(), requires_grad=True)
    want = F.conv2d(x, fp8.wide_weight(conv), conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    grad = torch.randn(want.shape, generator=_source(1))
    (expected,) = torch.autograd.grad(want, x, grad)
    got = module(x)
    assert torch.equal(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x, grad)[0], expected)


@pytest.mark.parametrize("size", [1e-4, 0.02, 3.0, 3e4])
def test_a_weight_is_within_a_sixteenth_unless_it_is_far_below_its_channels_largest(size):
    module = _linear(torch.float32)
    weight = torch.randn(32, 48, generator=_source()) * size
    weight[3] *= 1e-3  # a channel of its own size
    weight[5] = 0
    module[0].weight.copy_(weight)
    fp8.store_as_float8(module)
    got = fp8.wide_weight(module[0])
    assert got.isfinite().all() and (got[5] == 0).all()
    large = weight.abs() > weight.abs().amax(dim=1, keepdim=True) * 2.0**-13
    assert float(((got - weight).abs() / weight.abs())[large].max()) <= 2.0**-4
    exponents = torch.log2(module[0].weight_scale)
    assert torch.equal(exponents, exponents.round())


@pytest.mark.parametrize(("size", "plain_error"), [(0.05, 0.025), (0.005, 0.10), (0.002, 0.24)])
def test_a_scale_per_channel_is_as_exact_for_small_weights_as_for_large_ones(size, plain_error):
    """A plain cast, which sd-scripts makes, is subnormal below 2**-6: steps of 2**-9, whatever the weight."""
    weight = torch.randn(256, 256, generator=_source()) * size
    module = nn.Sequential(nn.Linear(256, 256, bias=False)).requires_grad_(False)
    module[0].weight.copy_(weight)
    fp8.store_as_float8(module)

    def error(stored):
        return float((stored - weight).norm() / weight.norm())

    assert error(fp8.wide_weight(module[0])) == pytest.approx(0.026, abs=0.002)
    assert error(weight.to(fp8.STORED).float()) > plain_error


def test_no_wide_copy_of_a_weight_is_kept_for_the_backward_pass():
    module = _linear()
    fp8.store_as_float8(module)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(torch.randn(4, 48, requires_grad=True))
    assert {t.dtype for t in kept if t.numel() == 48 * 32} == {fp8.STORED}


def test_the_unet_takes_half_the_bytes_and_keeps_its_dtype(bundle: ModelBundle):
    unet = copy.deepcopy(bundle.unet).to(torch.bfloat16).requires_grad_(False)
    numbers = sum(m.weight.numel() for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    channels = sum(m.weight.shape[0] for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    plain = sum(p.numel() for p in unet.parameters()) * 2
    saved = fp8.store_as_float8(unet)
    kept = [m for name, m in unet.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    numbers -= sum(m.weight.numel() for m in kept)
    channels -= sum(m.weight.shape[0] for m in kept)
    assert saved == (plain, plain - numbers + 2 * channels)
    assert unet.dtype == torch.bfloat16 and {type(m) for m in kept} == {nn.Linear, nn.Conv2d}
    assert {p.dtype for name, p in unet.named_parameters() if "norm" in name} == {torch.bfloat16}


def test_trained_weights_are_not_stored_in_float8():
    with pytest.raises(AssertionError, match="cannot be trained"):
        fp8.store_as_float8(_linear().requires_grad_(True))
