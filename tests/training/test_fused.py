"""Fused updates equal ordinary ones, free gradients, survive what is not finite, and are refused where they cannot."""

import copy
import importlib

import pytest
import torch
from torch import nn

from library.training.fused import FusedUpdate
from library.training.tensor_step import TensorStepper, Widening, fit_state, looks_across_tensors, widen_modes
from library.training.update import GuardedUpdate

# name -> (class, arguments)
PER_TENSOR = {
    "AdamW": ("torch.optim.AdamW", {"fused": True}),
    "AdamW of lists": ("torch.optim.AdamW", {"foreach": True}),
    "SGD": ("torch.optim.SGD", {"momentum": 0.9, "nesterov": True}),
    "RMSprop": ("torch.optim.RMSprop", {}),
    "torch Adafactor": ("torch.optim.Adafactor", {}),
    "AdamW8bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "Lion8bit": ("bitsandbytes.optim.Lion8bit", {}),
    "Lion": ("lion_pytorch.Lion", {}),
    "CAME": ("came_pytorch.CAME", {}),
    "Adafactor": ("transformers.optimization.Adafactor", {"lr": None, "relative_step": True, "warmup_init": True}),
    "AdamWScheduleFree": ("schedulefree.AdamWScheduleFree", {"warmup_steps": 3}),
    "RAdamScheduleFree": ("schedulefree.RAdamScheduleFree", {}),
}
ACROSS = ["prodigyopt.Prodigy", "dadaptation.DAdaptAdam", "dadaptation.DAdaptAdaGrad", "dadaptation.DAdaptLion"]


def _class(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _maker(name):
    path, arguments = PER_TENSOR[name]

    def make(groups):
        if arguments.get("relative_step"):
            groups = [{**group, "lr": None} for group in groups]
        optimizer = _class(path)(groups, **{"lr": 1e-2, **arguments})
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


class Net(nn.Module):
    """Two Linears with biases, the first large enough for 8-bit state, and one layer that can be left out."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(64, 80), nn.Linear(80, 8), nn.Linear(8, 8)
        self.to(dtype)

    def forward(self, x, skip=False):
        h = self.second(torch.tanh(self.first(x)))
        return h if skip else self.third(h)

    def groups(self):
        rest = [*self.second.parameters(), *self.third.parameters()]
        return [
            {"name": "a", "params": list(self.first.parameters()), "lr": 1e-2},
            {"name": "b", "params": rest, "lr": 3e-3},
        ]


def _train(net, update, steps, *, accumulation=1, start=0, schedule=None, skip=()):
    norms = []
    for step in range(start, start + steps):
        source = torch.Generator().manual_seed(step)
        for micro in range(accumulation):
            x = torch.randn(4, 64, generator=source).to(next(net.parameters()).dtype)
            loss = net(x, skip=(step, micro) in skip).float().square().mean() / accumulation
            if micro == accumulation - 1:
                with update.last_backward():
                    loss.backward()
            else:
                loss.backward()
        norms.append(float(update()))
        if schedule is not None:
            schedule.step()
    return norms


def _same(a, b):
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("num_groups", [None, 3])
@pytest.mark.parametrize("name", PER_TENSOR)
def test_fused_equals_unfused_to_the_bit(name, num_groups):
    """With accumulation, two rates, a schedule, and a layer without any gradient in one step."""
    skipped = {(2, 0), (2, 1), (4, 1)}
    plain, fused = Net(), Net()
    optimizers = [_maker(name)(net.groups()) for net in (plain, fused)]
    updates = GuardedUpdate(optimizers[0], 0.0), FusedUpdate(optimizers[1], num_groups)
    norms = []
    for net, optimizer, update in zip((plain, fused), optimizers, updates, strict=True):
        schedule = None
        if name != "Adafactor":  # it sets its own rates
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        norms.append(_train(net, update, 6, accumulation=2, schedule=schedule, skip=skipped))
    assert _same(plain, fused)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    states = [optimizer.state_dict() for optimizer in optimizers]
    for a, b in zip(*(state["param_groups"] for state in states), strict=True):
        assert a == b
    assert not _same(plain, Net())


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Adafactor", "AdamWScheduleFree"])
def test_a_state_saved_fused_goes_on_unfused_and_the_other_way_round(name, tmp_path):
    whole = Net()
    _train(whole, GuardedUpdate(_maker(name)(whole.groups()), 0.0), 6)
    for first, second in ((FusedUpdate, GuardedUpdate), (GuardedUpdate, FusedUpdate)):
        net = Net()
        optimizer = _maker(name)(net.groups())
        _train(net, first(optimizer) if first is FusedUpdate else first(optimizer, 0.0), 3)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        again = Net()
        again.load_state_dict(copy.deepcopy(net.state_dict()))
        resumed = _maker(name)(again.groups())
        resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        _train(again, second(resumed) if second is FusedUpdate else second(resumed, 0.0), 3, start=3)
        assert _same(again, whole)


@pytest.mark.parametrize("num_groups", [None, 2])
def test_gradients_are_freed_inside_the_last_backward_pass_only(num_groups):
    net = Net()
    update = FusedUpdate(torch.optim.SGD(net.groups(), lr=0.1), num_groups)
    net(torch.ones(2, 64)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    update()
    _train(net, update, 1, skip={(0, 0)})  # one layer has no gradient here, which must not be waited for later
    before = net.second.weight.detach().clone()
    with update.last_backward():
        net(torch.ones(2, 64)).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert not torch.equal(net.second.weight, before)


def test_gradients_that_nobody_wants_are_freed_and_change_nothing():
    net = Net()
    update = FusedUpdate(torch.optim.SGD(net.groups(), lr=0.1))
    with update.discarding():
        net(torch.ones(2, 64)).sum().backward()
    assert all(p.grad is None for p in net.parameters()) and _same(net, Net())
    assert float(update()) == 0


def test_groups_hold_neighbours_of_one_rate_and_wait_for_their_last_gradient():
    net = Net()
    update = FusedUpdate(torch.optim.SGD(net.groups(), lr=0.1), num_groups=2)
    sizes = [len(unit.params) for unit in update._units]
    assert sizes == [2, 3, 1]  # six tensors, three a group, rates never mixed


@pytest.mark.parametrize(
    ("num_groups", "left"), [(None, {"second.weight"}), (2, {"second.weight", "second.bias", "third.weight"})]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_alone_counted_and_without_a_trace(num_groups, left, value):
    net = Net()
    optimizer = torch.optim.AdamW(net.groups())
    update = FusedUpdate(optimizer, num_groups)
    _train(net, update, 1)
    before = copy.deepcopy(net)
    state = {name: copy.deepcopy(optimizer.state[p]) for name, p in net.named_parameters()}
    net.second.weight.register_hook(lambda grad: grad * value)
    (norm,) = _train(net, update, 1, start=1)
    assert not torch.isfinite(torch.tensor(norm))
    assert float(update.skipped) == 1 and float(update.last_bad) == 1
    for (name, p), old in zip(net.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old) == (name in left), name
        assert torch.equal(optimizer.state[p]["step"], state[name]["step"]) == (name in left), name


def test_a_finite_step_clears_the_mark_of_a_bad_one():
    net = Net()
    for update in (
        FusedUpdate(torch.optim.SGD(net.groups(), lr=0.1)),
        GuardedUpdate(torch.optim.SGD(net.groups(), lr=0.1), 1.0),
    ):
        hook = net.third.bias.register_hook(lambda grad: grad * float("nan"))
        _train(net, update, 2)
        hook.remove()
        _train(net, update, 1)
        assert float(update.skipped) == 2 and float(update.last_bad) == 0


# Which optimizers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PER_TENSOR)
def test_an_optimizer_whose_update_is_per_tensor_is_found_to_be_so(name):
    assert looks_across_tensors(_maker(name)) == ""


@pytest.mark.parametrize("path", ACROSS)
def test_an_optimizer_that_estimates_from_all_tensors_is_found_out(path):
    assert "depends on the other tensors" in looks_across_tensors(lambda groups: _class(path)(groups, lr=1.0))


def test_an_optimizer_of_ones_own_that_clips_over_all_tensors_is_found_out():
    class Clipping(torch.optim.SGD):
        def step(self, closure=None):
            torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
            return super().step(closure)

    assert looks_across_tensors(lambda groups: Clipping(groups, lr=0.1))


# In half precision -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PER_TENSOR)
def test_full_bf16_fused_equals_unfused_and_steps_in_float32(name):
    nets = [Net(torch.bfloat16) for _ in range(2)]
    optimizers = [_maker(name)(net.groups()) for net in nets]
    widenings = [Widening(3, lambda: 0, stochastic=True) for _ in range(2)]
    updates = [GuardedUpdate(optimizers[0], 0.0, widening=widenings[0]), FusedUpdate(optimizers[1], None, widenings[1])]
    for net, update, widening in zip(nets, updates, widenings, strict=True):
        for step in range(8):
            widening.global_step = lambda step=step: step
            _train(net, update, 1, start=step)
    assert _same(*nets) and not _same(nets[0], Net(torch.bfloat16))
    assert {p.dtype for p in nets[0].parameters()} == {torch.bfloat16}
    dtypes = {v.dtype for s in optimizers[1].state.values() for v in s.values() if isinstance(v, torch.Tensor)}
    assert torch.bfloat16 not in dtypes


def test_an_optimizer_that_looks_across_tensors_sees_all_of_them_in_float32():
    seen = []

    class Looking(torch.optim.SGD):
        def step(self, closure=None):
            params = [p for group in self.param_groups for p in group["params"]]
            seen.append([(p.dtype, p.grad.dtype) for p in params])
            return super().step(closure)

    net = Net(torch.bfloat16)
    widening = Widening(3, lambda: 0, stochastic=True)
    update = GuardedUpdate(Looking(net.groups(), lr=0.1), 0.0, widening=widening, by_tensor=False)
    _train(net, update, 1)
    assert seen == [[(torch.float32, torch.float32)] * 6]


@pytest.mark.parametrize("path", ["schedulefree.AdamWScheduleFree", "schedulefree.SGDScheduleFree"])
def test_schedule_free_weights_of_bf16_are_averaged_in_float32(path):
    """The evaluation weights of the bf16 run are those of the formula on its float32 state, rounded."""
    net = Net(torch.bfloat16)
    optimizer = _class(path)(net.groups(), lr=0.05)
    optimizer.train()
    widening = Widening(3, lambda: 0, stochastic=True)
    widen_modes(optimizer, widening)
    update = GuardedUpdate(optimizer, 0.0, widening=widening)
    _train(net, update, 4)
    beta = 0.9
    expected = [
        p.detach().float().lerp(optimizer.state[p]["z"], 1 - 1 / beta).to(torch.bfloat16) for p in net.parameters()
    ]
    optimizer.eval()
    assert all(torch.equal(p, want) for p, want in zip(net.parameters(), expected, strict=True))
    assert not any(group["train_mode"] for group in optimizer.param_groups)
    optimizer.train()
    assert all(group["train_mode"] for group in optimizer.param_groups)


def test_the_norm_of_half_precision_gradients_is_summed_in_float32():
    params = [nn.Parameter(torch.zeros(1000, dtype=torch.float16)) for _ in range(2)]
    update = GuardedUpdate(torch.optim.SGD(params, lr=0.0), 0.0)
    for p in params:
        p.grad = torch.full_like(p, 2000.0)  # the sum of squares, 8e9, and the norm, 89,443, are beyond float16
    assert float(update()) == pytest.approx(2000.0 * 2000**0.5, rel=1e-4)
    assert float(update.skipped) == 0


def test_steps_in_parts_leave_groups_and_their_tensors_as_they_were():
    net = Net()
    optimizer = torch.optim.SGD(net.groups(), lr=0.1)
    groups, params = list(optimizer.param_groups), [list(group["params"]) for group in optimizer.param_groups]
    stepper = TensorStepper(optimizer)
    net.first.weight.grad = torch.ones_like(net.first.weight)
    stepper.step([net.first.weight])
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert all(
        a is b for group, want in zip(groups, params, strict=True) for a, b in zip(group["params"], want, strict=True)
    )


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion", "CAME", "Adafactor"])
@pytest.mark.parametrize("widened_first", [True, False])
def test_a_state_of_another_precision_is_fitted(name, widened_first):
    """From stepping in float32 to stepping in bf16, and back, as with and without stochastic rounding."""
    widening = Widening(3, lambda: 0, stochastic=True)
    net = Net(torch.bfloat16)
    first, second = (widening, None) if widened_first else (None, widening)
    optimizer = _maker(name)(net.groups())
    _train(net, GuardedUpdate(optimizer, 0.0, widening=first), 2)
    assert fit_state(optimizer, first) == ""
    fit_state(optimizer, second)
    before = net.first.weight.detach().clone()
    _train(net, GuardedUpdate(optimizer, 0.0, widening=second), 2, start=2)
    assert torch.isfinite(net.first.weight).all() and not torch.equal(net.first.weight, before)
