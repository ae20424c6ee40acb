"""Frozen weights stored in 8 bits and computed with in the model's own precision (`--fp8_base`)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STORED = torch.float8_e4m3fn
# Kept as they are: a model's dtype is read from its first parameter, and these are few and sensitive.
_KEPT = ("conv_in", "conv_out", "time_embedding", "add_embedding")


class Saved(NamedTuple):
    """Bytes of all weights and buffers of a module before and after."""

    before: int
    after: int


def store_as_float8(module: nn.Module) -> Saved:
    """Store the weights of all Linear and Conv2d modules below `module` as float8_e4m3fn, in place.

    A weight is its float8 value times a power of two for each output channel, which brings the channel's largest value
    just below 448, the largest number of the format: below it there are 15 powers of two with 3 bits of mantissa, so
    the relative error of a weight is at most 1/16 until it is 2**13 times smaller than the channel's largest. Norms,
    embeddings, biases, the first and last convolution and the embeddings of time and sizes keep their dtype.

    Modules compute in the dtype that the weights had: input and weights are cast to it, and no wide copy of a weight
    outlives its matrix product, neither for the backward pass. The weights must be frozen; gradients flow to inputs.
    """
    before = _bytes(module)
    for name, child in module.named_modules():
        if type(child) in (nn.Linear, nn.Conv2d) and not name.startswith(_KEPT):
            _store(child)
    return Saved(before, _bytes(module))


def wide_weight(module: "Float8Linear | Float8Conv2d") -> Tensor:
    """The weight that the module computes with, in its compute dtype."""
    return _wide(module.weight, module.weight_scale, module.compute_dtype)


class Float8Linear(nn.Linear):
    """A Linear whose weight is float8 times `weight_scale` (out, 1), computing in `compute_dtype`."""

    weight_scale: Tensor
    compute_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) of any float dtype; the result (..., out) is of `compute_dtype`."""
        return _LinearProduct.apply(x.to(self.compute_dtype), self.weight, self.weight_scale, self.bias)


class Float8Conv2d(nn.Conv2d):
    """A Conv2d whose weight is float8 times `weight_scale` (out, 1, 1, 1), computing in `compute_dtype`."""

    weight_scale: Tensor
    compute_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in, H, W) of any float dtype; the result is of `compute_dtype`."""
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _Convolution.apply(x.to(self.compute_dtype), self.weight, self.weight_scale, self.bias, geometry)


class _LinearProduct(torch.autograd.Function):
    """F.linear that keeps only the float8 weight for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _wide(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, scale = ctx.saved_tensors
        return grad @ _wide(weight, scale, grad.dtype), None, None, None


class _Convolution(torch.autograd.Function):
    """F.conv2d that keeps only the float8 weight for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, _wide(weight, scale, x.dtype), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, scale = ctx.saved_tensors
        wide = _wide(weight, scale, grad.dtype)
        return torch.nn.grad.conv2d_input(ctx.shape, wide, grad, *ctx.geometry), None, None, None, None


def _store(module: nn.Linear | nn.Conv2d) -> None:
    weight = module.weight.detach()
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return
    assert not module.weight.requires_grad, "float8 weights cannot be trained"
    largest = weight.float().flatten(1).abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    # Powers of two, which change no bit of a mantissa; kept within the range in which all dtypes here hold them.
    exponent = torch.ceil(torch.log2(largest / torch.finfo(STORED).max)).clamp(-24, 15)
    scale = torch.exp2(exponent).view(-1, *[1] * (weight.ndim - 1))
    stored = (weight.float() / scale).to(STORED)
    dtype = weight.dtype
    module.__class__ = Float8Conv2d if isinstance(module, nn.Conv2d) else Float8Linear
    module.weight = nn.Parameter(stored, requires_grad=False)
    module.register_buffer("weight_scale", scale.to(dtype))
    module.compute_dtype = dtype


def _wide(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) * scale.to(dtype)


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
