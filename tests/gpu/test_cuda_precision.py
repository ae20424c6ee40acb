"""Precisions and fused updates on a GPU. Skipped without CUDA."""

import pytest
import torch
from safetensors.torch import load_file

from library.models import fp8
from library.training.fused import FusedUpdate
from library.training.tensor_step import Widening
from library.training.update import GuardedUpdate
from tests.e2e.conftest import fine_tune  # noqa: F401 (a fixture)
from tests.training.test_fused import PER_TENSOR, Net, _maker

pytestmark = pytest.mark.gpu


def _pair(dtype=torch.float32, name="AdamW", widened=False):
    nets = [Net(dtype).cuda() for _ in range(2)]
    widenings = [Widening(3, lambda: 0, stochastic=True) if widened else None for _ in range(2)]
    optimizers = [_maker(name)(net.groups()) for net in nets]
    return nets, (GuardedUpdate(optimizers[0], 0.0, None, widenings[0]), FusedUpdate(optimizers[1], None, widenings[1]))


def _train(net, update, steps):
    for step in range(steps):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).cuda().to(next(net.parameters()).dtype)
        with update.last_backward():
            net(x).float().square().mean().backward()
        update()


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("name", PER_TENSOR)
def test_fused_equals_unfused(name, widened):
    nets, updates = _pair(torch.bfloat16 if widened else torch.float32, name, widened)
    for net, update in zip(nets, updates, strict=True):
        _train(net, update, 8)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(nets[0].first.weight, Net(nets[0].first.weight.dtype).cuda().first.weight)


def test_a_tensor_with_a_gradient_that_is_not_finite_is_left_alone():
    nets, updates = _pair()
    net, update = nets[1], updates[1]
    _train(net, update, 1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.second.weight.register_hook(lambda grad: grad * float("inf"))
    _train(net, update, 1)
    same = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert same == {"second.weight"} and float(update.skipped) == 1


def test_fused_holds_one_gradient_at_a_time():
    def peak(fused):
        torch.cuda.empty_cache()
        net = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(12)]).cuda()
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        update = FusedUpdate(optimizer) if fused else GuardedUpdate(optimizer, 0.0)
        start = torch.cuda.memory_allocated()
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            with update.last_backward():
                net(torch.ones(1, 1024, device="cuda")).square().mean().backward()
            update()
        return (torch.cuda.max_memory_allocated() - start) / (12 * 1024**2)

    assert peak(True) < 8 + 4 / 12 + 0.5 and peak(False) > 11.5


def test_float8_products_equal_those_with_the_stored_weight():
    linear = torch.nn.Sequential(torch.nn.Linear(64, 48)).cuda().bfloat16().requires_grad_(False)
    fp8.store_as_float8(linear)
    x = torch.randn(5, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    want = torch.nn.functional.linear(x, fp8.wide_weight(linear[0]), linear[0].bias)
    assert torch.equal(linear(x), want)


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed_precision=fp16", "--full_fp16"],
        ["--mixed_precision=bf16", "--full_bf16", "--fused_backward_pass"],
        ["--mixed_precision=fp16", "--fp8_base"],
    ],
)
def test_a_network_trains_in_each_precision(train, flags):
    tensors = load_file(train("out", "--max_train_steps=8", *flags) / "net.safetensors")
    assert all(torch.isfinite(value).all() for value in tensors.values())
    assert any(float(value.abs().max()) > 0 for name, value in tensors.items() if name.endswith("lora_up.weight"))


@pytest.mark.parametrize(
    "flags", [["--full_fp16", "--mixed_precision=fp16"], ["--full_bf16", "--mixed_precision=bf16"]]
)
def test_a_full_fine_tune_trains_in_half_precision(fine_tune, flags):  # noqa: F811
    output = fine_tune("out", "--max_train_steps=6", "--learning_rate=1e-4", *flags)
    tensors = load_file(output / "net.safetensors")
    assert all(torch.isfinite(value).all() for value in tensors.values())
