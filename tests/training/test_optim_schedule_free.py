"""Schedule-free optimizers: the average outside training, and no trace of looking at it."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from library.training.evaluation import evaluation
from library.training.optim import build_optimizer, evaluated, evaluation_mode

KINDS = ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree", "ProdigyPlusScheduleFree"]


def _make(kind: str, dtype: torch.dtype = torch.float32):
    param = torch.nn.Parameter(torch.linspace(-1, 1, 48 * 40).reshape(48, 40).to(dtype))
    groups = [{"name": "unet", "params": [param], "lr": 0.1}]
    arguments = {"d0": 0.1} if kind.startswith("Prodigy") else {}
    return build_optimizer(groups, optimizer_type=kind, learning_rate=0.1, arguments=arguments), param


def _steps(optimizer, param, first, last, *, look=False):
    for index in range(first, last):
        noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(index))
        param.grad = (param.detach().float() + noise).to(param.dtype)
        optimizer.step()
        with evaluation_mode(optimizer) if look else nullcontext():
            pass


@pytest.mark.parametrize("kind", KINDS)
def test_inside_are_the_averages_and_afterwards_the_bits_of_before(kind):
    optimizer, param = _make(kind)
    _steps(optimizer, param, 0, 7)
    y, z = param.detach().clone(), optimizer.state[param]["z"].clone()
    beta = optimizer.param_groups[0].get("betas", (0.9,))[0]
    with evaluation_mode(optimizer):
        # y = (1 - beta) z + beta x (Defazio et al. 2024, equation 2)
        torch.testing.assert_close((1 - beta) * z + beta * param, y, rtol=0, atol=1e-5)
        assert not torch.equal(param, y)
        assert not optimizer.param_groups[0]["train_mode"]
    assert torch.equal(param, y) and torch.equal(optimizer.state[param]["z"], z)
    assert optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_looking_at_every_step_changes_nothing(kind, dtype):
    (plain, a), (watched, b) = _make(kind, dtype), _make(kind, dtype)
    _steps(plain, a, 0, 9)
    _steps(watched, b, 0, 9, look=True)
    assert torch.equal(a, b)


def test_the_library_s_own_way_there_and_back_would_leave_a_trace():
    optimizer, param = _make("AdamWScheduleFree")
    _steps(optimizer, param, 0, 7)
    before = param.detach().clone()
    optimizer.eval()
    optimizer.train()
    assert not torch.equal(param, before), "if it is exact now, evaluation_mode need not keep a copy"


def test_the_weights_come_back_after_an_error_and_entering_twice_is_entering_once():
    optimizer, param = _make("AdamWScheduleFree")
    _steps(optimizer, param, 0, 5)
    before = param.detach().clone()
    with pytest.raises(RuntimeError), evaluation_mode(optimizer):
        average = param.detach().clone()
        with evaluation_mode(optimizer):
            assert torch.equal(param, average)
        assert torch.equal(param, average), "the inner one must not go back to training"
        raise RuntimeError
    assert torch.equal(param, before)


def test_other_optimizers_do_not_notice_and_calls_are_made_inside():
    free, param = _make("AdamWScheduleFree")
    _steps(free, param, 0, 5)
    assert evaluated(free, lambda extra: (free.param_groups[0]["train_mode"], extra))(3) == (False, 3)
    plain, param = _make("AdamW")
    _steps(plain, param, 0, 5)
    before = param.detach().clone()
    with evaluation_mode(plain):
        assert torch.equal(param, before)


def test_runs_are_judged_by_the_averages():
    optimizer, param = _make("AdamWScheduleFree")
    _steps(optimizer, param, 0, 5)
    training_point = param.detach().clone()
    with evaluation_mode(optimizer):
        average = param.detach().clone()
    bundle = SimpleNamespace(unet=None, text_encoder_1=None, text_encoder_2=None)
    parts = SimpleNamespace(trained=torch.nn.Module(), step=torch.nn.Module(), optimizer=optimizer, ema=None)
    with evaluation(SimpleNamespace(bundle=bundle), parts, averaged=False):
        assert torch.equal(param, average)
    assert torch.equal(param, training_point)
