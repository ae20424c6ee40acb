"""Optimizers by name, their arguments and rates, and the guarded update."""

import pytest
import torch

from library.config.choices import LR_SCHEDULERS, OPTIMIZERS, ROOT
from library.errors import UserError
from library.training import optim
from library.training.optim import build_optimizer, effective_rates, try_out
from library.training.optimizer_table import ROWS
from library.training.update import GuardedUpdate


def _group(value=1.0, lr=0.1, name="unet"):
    return {"name": name, "params": [torch.nn.Parameter(torch.full((64, 80), value))], "lr": lr}


def _build(kind="AdamW", arguments=None, groups=None):
    return build_optimizer(groups or [_group()], optimizer_type=kind, learning_rate=0.1, arguments=arguments or {})


@pytest.mark.parametrize(
    "kind, path",
    [
        ("AdamW", "torch.optim.adamw.AdamW"),
        ("adamw", "torch.optim.adamw.AdamW"),
        ("AdaFactor", "transformers.optimization.Adafactor"),
        ("PAGEDadamw32BIT", "bitsandbytes.optim.adamw.PagedAdamW32bit"),
        ("lion", "lion_pytorch.lion_pytorch.Lion"),
        ("SGDNesterov8bit", "bitsandbytes.optim.sgd.SGD8bit"),
        ("DAdaptation", "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint"),
        ("came", "came_pytorch.CAME.CAME"),
        ("torch.optim.NAdam", "torch.optim.nadam.NAdam"),
        ("SGD", "torch.optim.sgd.SGD"),
    ],
)
def test_names_lead_to_classes(kind, path):
    cls = type(_build(kind))
    assert f"{cls.__module__}.{cls.__qualname__}" == path


def test_the_table_and_the_option_know_the_same_names():
    assert tuple(ROWS) == OPTIMIZERS


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_named_optimizer_goes_downhill_through_the_guarded_update(kind):
    rate = 1.0 if kind.startswith(("DAdapt", "Prodigy")) else 0.01
    # The estimators start at a rate of 1e-6; growing takes them more steps than a test should make.
    start = {"d0": 1e-3} if kind.startswith(("DAdapt", "Prodigy")) else {}
    optimizer = _build(kind, start, [_group(lr=rate), _group(lr=rate, name="te1")])
    update = GuardedUpdate(optimizer, 1.0)
    losses = []
    for _ in range(10):
        loss = sum((parameter**2).mean() for parameter in update.params)
        loss.backward()
        losses.append(float(loss.detach()))
        update()
    assert min(losses) < losses[0] - 1e-5
    assert all(torch.isfinite(parameter).all() for parameter in update.params)


def test_nesterov_has_a_momentum_unless_told_otherwise():
    group = _build("SGDNesterov").param_groups[0]
    assert (group["nesterov"], group["momentum"]) == (True, 0.9)
    assert _build("SGDNesterov", {"momentum": 0.5}).param_groups[0]["momentum"] == 0.5
    assert _build("SGDNesterov8bit").param_groups[0]["betas"][0] == 0.9
    assert _build("SGDNesterov8bit", {"momentum": 0.5}).param_groups[0]["betas"][0] == 0.5


def test_a_package_that_is_not_there_is_named_with_the_way_to_get_it(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(optim.importlib, "import_module", absent)
    with pytest.raises(UserError) as caught:
        _build("ProdigyPlusScheduleFree")
    (problem,) = caught.value.problems
    assert "ProdigyPlusScheduleFree needs prodigyplus" in problem.what
    assert problem.fix.startswith("pip install prodigy-plus-schedule-free, ")


@pytest.mark.parametrize("kind", ["Prodigy", "DAdaptAdaGrad", "DAdaptAdanIP", "DAdaptSGD"])
def test_estimators_refuse_different_rates_before_the_first_step(kind):
    with pytest.raises(UserError, match="one learning rate for everything"):
        _build(kind, groups=[_group(lr=1.0), _group(lr=0.5, name="te1")])
    _build(kind, groups=[_group(lr=1.0), _group(lr=0.0, name="te1")])


def test_the_rate_of_the_class_is_that_of_the_groups_when_the_run_has_none():
    built = build_optimizer([_group(lr=0.5)], optimizer_type="Prodigy", learning_rate=0.0, arguments={})
    assert built.defaults["lr"] == 0.5


@pytest.mark.parametrize("kind", ["DAdaptAdam", "DAdaptLion", "Prodigy", "ProdigyPlusScheduleFree"])
def test_the_effective_rate_is_d_times_lr(kind):
    optimizer = _build(kind, {"d0": 1e-4}, [_group(lr=0.5)])
    assert effective_rates(optimizer.param_groups) == {"lr/d*lr/unet": pytest.approx(0.5e-4)}
    parameter = optimizer.param_groups[0]["params"][0]
    for _ in range(15):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    found = effective_rates(optimizer.param_groups)["lr/d*lr/unet"]
    assert found == pytest.approx(float(optimizer.param_groups[0]["d"]) * 0.5)
    assert found > 0.6e-4, "the estimate grows while the gradient keeps its direction"


def test_other_optimizers_have_no_effective_rate():
    assert effective_rates(_build("AdamW").param_groups) == {}
    assert effective_rates(_build("torch.optim.Adafactor").param_groups) == {}, "d is its clipping threshold"


def test_the_warm_up_of_a_schedule_free_optimizer_is_its_effective_rate():
    optimizer = _build("AdamWScheduleFree", {"warmup_steps": 4})
    for expected in (0.025, 0.05, 0.075, 0.1, 0.1):
        parameter = optimizer.param_groups[0]["params"][0]
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert effective_rates(optimizer.param_groups) == {"lr/warmup/unet": pytest.approx(expected)}


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


class Unsaveable(torch.optim.SGD):
    """Its state holds an object of a class that plain data does not have."""

    def state_dict(self):
        return {**super().state_dict(), "self": Unsaveable}


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("torch.optim.LBFGS", "cannot make a plain step: .*closure"),
        ("torch.optim.SparseAdam", "cannot make a plain step: "),
        (f"{__name__}.Unsaveable", "cannot be saved and read back"),
    ],
)
def test_classes_that_cannot_work_are_found_by_trying_them(kind, word):
    optimizer = _build(kind, groups=[{"name": "trial", "params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": 1.0}])
    with pytest.raises(UserError, match=word):
        try_out(optimizer)


@pytest.mark.parametrize("kind", ["torch.optim.Muon", "torch.optim.Adafactor", "pytorch_optimizer.AdaBelief"])
def test_classes_that_can_work_pass_the_trial(kind):
    try_out(_build(kind))


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


def test_the_page_names_every_optimizer_and_schedule():
    page = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    assert [name for name in (*OPTIMIZERS, *LR_SCHEDULERS) if f"`{name}`" not in page] == []
