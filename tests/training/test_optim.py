"""Optimizers by name, schedules by name, and the guarded update."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from library.errors import UserError
from library.training.lr import build_scheduler, steps_from
from library.training.optim import build_optimizer
from library.training.update import GuardedUpdate


def _group(value=1.0, lr=0.1, name="unet"):
    return {"name": name, "params": [torch.nn.Parameter(torch.full((64, 80), value))], "lr": lr}


def _build(kind="AdamW", arguments=None, groups=None):
    return build_optimizer(groups or [_group()], optimizer_type=kind, learning_rate=0.1, arguments=arguments or {})


@pytest.mark.parametrize(
    "kind, module",
    [
        ("AdamW", "torch.optim.adamw"),
        ("adamw", "torch.optim.adamw"),
        ("AdamW8bit", "bitsandbytes"),
        ("AdaFactor", "transformers"),
        ("torch.optim.NAdam", "torch.optim.nadam"),
        ("SGD", "torch.optim.sgd"),
    ],
)
def test_optimizers_by_name_move_the_weights(kind, module):
    optimizer = _build(kind)
    assert type(optimizer).__module__.startswith(module)
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    GuardedUpdate(optimizer, 1.0)()
    assert (parameter < 1.0).all()


def test_groups_keep_their_rates_and_names():
    optimizer = _build(groups=[_group(lr=0.1), _group(lr=0.01, name="textencoder1")])
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [("unet", 0.1), ("textencoder1", 0.01)]


def test_arguments_reach_the_class():
    optimizer = _build(arguments={"weight_decay": 0.25, "betas": (0.8, 0.9)})
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_adafactor_uses_relative_steps_unless_told_otherwise():
    assert _build("Adafactor").param_groups[0]["lr"] is None
    fixed = _build("Adafactor", {"relative_step": False, "scale_parameter": False, "warmup_init": False})
    assert fixed.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "kind, arguments, word",
    [
        ("torch.optim.Nope", {}, "Nope"),
        ("no.such.module.Class", {}, "no.such.module"),
        ("torch.optim.lr_scheduler.StepLR", {}, "not an optimizer"),
        ("AdamW", {"colour": 1}, "colour"),
    ],
)
def test_wrong_optimizers_are_named(kind, arguments, word):
    with pytest.raises(UserError, match=word):
        _build(kind, arguments)


def test_a_non_finite_gradient_is_skipped_and_counted_and_leaves_no_trace():
    a, b = _build(), _build()
    updates = GuardedUpdate(a, 1.0), GuardedUpdate(b, 1.0)
    for update, bad_first in zip(updates, (True, False), strict=True):
        parameter = update.params[0]
        if bad_first:
            parameter.grad = torch.full_like(parameter, float("nan"))
            assert not torch.isfinite(update())
        for _ in range(3):
            parameter.grad = torch.ones_like(parameter)
            update()
    assert [float(u.skipped) for u in updates] == [1.0, 0.0]
    assert torch.equal(updates[0].params[0], updates[1].params[0])
    assert torch.equal(a.state[updates[0].params[0]]["step"], b.state[updates[1].params[0]]["step"])


def test_clipping_is_global_and_the_norm_is_the_one_before():
    groups = [_group(lr=1.0, name="a"), _group(lr=1.0, name="b")]
    optimizer = torch.optim.SGD([dict(g) for g in groups], lr=1.0)
    update = GuardedUpdate(optimizer, max_norm=0.5)
    for parameter in update.params:
        parameter.grad = torch.ones_like(parameter)
    norm = update()
    expected = (2 * 64 * 80) ** 0.5
    assert float(norm) == pytest.approx(expected)
    assert torch.allclose(1.0 - update.params[0], torch.full((64, 80), 0.5 / expected), atol=1e-6)


def test_max_norm_zero_means_no_clipping():
    optimizer = torch.optim.SGD([_group()["params"][0]], lr=1.0)
    update = GuardedUpdate(optimizer, max_norm=0.0)
    update.params[0].grad = torch.full_like(update.params[0], 7.0)
    update()
    assert torch.allclose(update.params[0], torch.full((64, 80), -6.0))


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
)
def test_schedules_equal_those_of_diffusers(name):
    warmup = 0 if name == "constant" else 0.2
    ours = build_scheduler(o1 := _build(), name=name, total_steps=20, warmup=warmup, num_cycles=2, power=1.5)
    theirs = get_scheduler(
        name, o2 := _build(), num_warmup_steps=int(warmup * 20), num_training_steps=20, num_cycles=2, power=1.5
    )
    for _ in range(20):
        assert ours.get_last_lr() == theirs.get_last_lr()
        for optimizer, scheduler in ((o1, ours), (o2, theirs)):
            optimizer.step()
            scheduler.step()


def test_constant_refuses_warmup_and_names_the_way_out():
    with pytest.raises(UserError, match="constant schedule has no warm-up"):
        build_scheduler(_build(), name="constant", total_steps=10, warmup=5)


def test_warmup_lengths():
    assert steps_from(5, 100) == 5
    assert steps_from(0.055, 100) == 5
    assert steps_from(0.0, 100) == 0
    assert steps_from(1.0, 100) == 100
