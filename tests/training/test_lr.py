"""Schedules by name against closed forms, by class, and their resume."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.config.choices import LR_SCHEDULERS, TORCH_SCHEDULERS
from library.errors import UserError
from library.training.lr import NOT_KNOWN_YET, SCHEDULES, LrSettings, build_scheduler, rex_factor, steps_from
from library.training.optim import build_optimizer

TOTAL, WARM, DECAY = 40, 8, 16
RATES = {"unet": 0.5, "te1": 0.25}


def _optimizer(kind="AdamW"):
    groups = [{"name": name, "params": [torch.nn.Parameter(torch.ones(3))], "lr": lr} for name, lr in RATES.items()]
    return build_optimizer(groups, optimizer_type=kind, learning_rate=0.5, arguments={})


def _after_warmup(step):
    return (step - WARM) / (TOTAL - WARM)


def _cosine(cycles_of_pi):
    return lambda t: 0.5 * (1 + math.cos(math.pi * cycles_of_pi * _after_warmup(t)))


def _floored(factor, floor):
    return lambda t: floor + (1 - floor) * factor(t)


def _wsd(t):
    if t < TOTAL - DECAY:
        return 1.0
    return _floored(lambda t: 0.5 * (1 + math.cos(math.pi * 3 * (t - TOTAL + DECAY) / DECAY)), 0.1)(t)


# Name -> settings, the factor after the warm-up, and that in it (None: t / WARM).
CLOSED_FORMS = {
    "constant": ({"warmup": 0}, lambda t: 1.0, lambda t: 1.0),
    "constant_with_warmup": ({}, lambda t: 1.0, None),
    "linear": ({}, lambda t: 1 - _after_warmup(t), None),
    "cosine": ({}, _cosine(1), None),
    "cosine_with_restarts": (
        {"num_cycles": 3},
        lambda t: 0.5 * (1 + math.cos(math.pi * (3 * _after_warmup(t) % 1.0))),
        None,
    ),
    "cosine_with_min_lr": ({"num_cycles": 3, "min_ratio": 0.2}, _floored(_cosine(3), 0.2), None),
    "cosine_warmup_with_min_lr": (
        {"min_ratio": 0.2},
        _floored(lambda t: _cosine(1)(t + 1), 0.2),
        lambda t: (t + 1) / WARM,
    ),
    # It falls to the absolute rate lr_end of the run's learning rate.
    "polynomial": (
        {"power": 2.0, "arguments": {"lr_end": 0.05}},
        lambda t: ((0.5 - 0.05) * (1 - _after_warmup(t)) ** 2 + 0.05) / 0.5,
        None,
    ),
    "inverse_sqrt": ({"timescale": 12}, lambda t: math.sqrt(12 / (t + 12 - WARM)), None),
    "warmup_stable_decay": (
        {"decay": 0.4, "num_cycles": 3, "min_ratio": 0.1},
        _wsd,
        lambda t: 0.1 + 0.9 * t / WARM,
    ),
    "piecewise_constant": (
        {"warmup": 0, "arguments": {"step_rules": "1:5,0.1:20,0.01"}},
        lambda t: 0.1 if t < 20 else 0.01,
        lambda t: 1.0 if t < 5 else 0.1,
    ),
    "rex": (
        {"min_ratio": 0.1},
        _floored(lambda t: (1 - _after_warmup(t)) / (0.5 + 0.5 * (1 - _after_warmup(t))), 0.1),
        None,
    ),
}


def test_every_name_of_the_option_has_a_closed_form_here():
    assert set(CLOSED_FORMS) == set(SCHEDULES) == set(LR_SCHEDULERS) - {"adafactor"}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_schedule_follows_its_closed_form_at_every_step(name):
    more, factor, early = CLOSED_FORMS[name]
    settings = LrSettings(name=name, **{"warmup": 0.2, **more})
    optimizer = _optimizer()
    scheduler = build_scheduler(optimizer, settings, total_steps=TOTAL)
    for step in range(TOTAL):
        expected = factor(step) if step >= WARM else early(step) if early else step / WARM
        for rate, base in zip(scheduler.get_last_lr(), RATES.values(), strict=True):
            assert rate == pytest.approx(base * expected, abs=1e-9), step
        optimizer.step()
        scheduler.step()


def test_inverse_sqrt_takes_the_warm_up_for_its_timescale():
    scheduler = build_scheduler(_optimizer(), LrSettings(name="inverse_sqrt", warmup=4), total_steps=TOTAL)
    for _ in range(16):
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.5 * math.sqrt(4 / 16))


@pytest.mark.parametrize(("p", "expected"), [(0, 1.0), (0.25, 6 / 7), (0.5, 2 / 3), (0.75, 0.4), (1, 0.0)])
def test_rex_has_the_values_of_the_paper_s_formula(p, expected):
    assert rex_factor(int(100 * p), warmup=0, total=100) == pytest.approx(expected)


def test_rex_with_d_zero_is_linear_and_its_ends_hold():
    for step in range(0, 101, 10):
        linear = step / 20 if step < 20 else (100 - step) / 80
        assert rex_factor(step, warmup=20, total=100, d=0.0) == pytest.approx(linear)
    assert rex_factor(500, warmup=20, total=100, min_ratio=0.3) == 0.3
    assert rex_factor(0, warmup=0, total=1) == 1.0


@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 100),
    floor=st.floats(0, 1),
    d=st.floats(0, 0.99),
)
def test_rex_rises_to_one_then_falls_to_its_floor(total, warmup, floor, d):
    warmup = min(warmup, total - 1)
    factors = [rex_factor(step, warmup=warmup, total=total, min_ratio=floor, d=d) for step in range(total + 1)]
    assert factors[warmup] == 1.0 and factors[total] == pytest.approx(floor)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(factors[warmup:], factors[warmup + 1 :]))


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_warm_up_as_long_as_the_run_can_be_stepped_to_the_end(name):
    if CLOSED_FORMS[name][0].get("warmup") == 0 or name == "polynomial":
        return
    settings = LrSettings(name=name, **{**CLOSED_FORMS[name][0], "warmup": 1.0, "decay": 0})
    scheduler = build_scheduler(optimizer := _optimizer(), settings, total_steps=TOTAL)
    rates = [unet for (unet, _), _ in _run(scheduler, optimizer, TOTAL)]
    assert rates == sorted(rates) and rates[-1] <= 0.5


def _run(scheduler, optimizer, steps):
    rates = []
    for _ in range(steps):
        rates.append([(group["lr"], group.get("betas")) for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
    return rates


BY_CLASS = {
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [2, 7]},
    "ConstantLR": {"factor": 0.5},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 9},
    "CosineAnnealingLR": {"T_max": 8},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.5, "total_steps": TOTAL},
}


@pytest.mark.parametrize("name", [*CLOSED_FORMS, *BY_CLASS])
def test_a_schedule_resumes_exactly(name):
    if name in BY_CLASS:
        settings = LrSettings(cls=name, arguments=BY_CLASS[name])
    else:
        settings = LrSettings(name=name, **{"warmup": 0.2, **CLOSED_FORMS[name][0]})
    whole = build_scheduler(first := _optimizer(), settings, total_steps=TOTAL)
    _run(whole, first, 11)
    file = io.BytesIO()
    torch.save([first.state_dict(), whole.state_dict()], file)
    file.seek(0)
    resumed = build_scheduler(second := _optimizer(), settings, total_steps=TOTAL)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert _run(whole, first, 12) == _run(resumed, second, 12)
    assert whole.get_last_lr() == resumed.get_last_lr()


def test_every_class_that_the_option_knows_by_name_is_tried():
    assert set(BY_CLASS) == set(TORCH_SCHEDULERS)


def test_a_class_takes_the_place_of_the_name():
    settings = LrSettings(
        name="cosine", cls="torch.optim.lr_scheduler.StepLR", arguments={"step_size": 2, "gamma": 0.5}
    )
    scheduler = build_scheduler(optimizer := _optimizer(), settings, total_steps=TOTAL)
    rates = [unet for (unet, _), _ in _run(scheduler, optimizer, 5)]
    assert rates == [0.5, 0.5, 0.25, 0.25, 0.125]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (LrSettings(warmup=5), "constant schedule has no warm-up"),
        (LrSettings(name="adafactor"), "this optimizer does not set one"),
        (LrSettings(name="warmup_stable_decay", warmup=30, decay=0.5), "longer than the run"),
        (LrSettings(name="polynomial", warmup=1.0), "leaves nothing of the run"),
        (LrSettings(name="rex", arguments={"d": 1.0}), "less than 1"),
        (LrSettings(name="linear", arguments={"colour": 1}), "colour"),
        (LrSettings(name="piecewise_constant", arguments={"step_rules": "a:b"}), "refuses its settings"),
        (LrSettings(cls="ReduceLROnPlateau"), "wants to be told metrics"),
        (LrSettings(cls="StepLR"), "step_size"),
        (LrSettings(cls="torch.optim.lr_scheduler.Nope"), "has no 'Nope'"),
        (LrSettings(cls="torch.optim.AdamW"), "not a scheduler class"),
        (LrSettings(cls="no.such.module.Schedule"), "does not load here"),
        (LrSettings(cls="OneCycleLR", arguments={"max_lr": 1.0, "total_steps": 9}), "ends after 9 steps"),
        (LrSettings(cls=f"{__name__}.Unsaveable"), "cannot be saved and read back"),
    ],
)
def test_what_cannot_work_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        build_scheduler(_optimizer(), settings, total_steps=TOTAL)


class Unsaveable(torch.optim.lr_scheduler.ConstantLR):
    """Its state holds an object of a class that plain data does not have."""

    def state_dict(self):
        return {**super().state_dict(), "self": Unsaveable}


def test_a_length_that_is_not_known_yet_refuses_nothing():
    for settings in (
        LrSettings(name="warmup_stable_decay", warmup=3000, decay=5000),
        LrSettings(cls="OneCycleLR", arguments={"max_lr": 1.0, "total_steps": 9}),
    ):
        build_scheduler(_optimizer(), settings, total_steps=NOT_KNOWN_YET)


def test_relative_steps_need_no_schedule():
    optimizer = build_optimizer(
        [{"name": "unet", "params": [torch.nn.Parameter(torch.ones(3))], "lr": 1.0}],
        optimizer_type="Adafactor",
        learning_rate=1.0,
        arguments={},
    )
    scheduler = build_scheduler(optimizer, LrSettings(name="adafactor"), total_steps=TOTAL)
    assert scheduler.get_last_lr() == [0.0]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    # min(1e-2, 1/sqrt(step)) times the root mean square of the weights before the step, which is 1
    assert scheduler.get_last_lr() == [pytest.approx(1e-2)]


def test_lengths():
    assert steps_from(5, 100) == 5
    assert steps_from(0.055, 100) == 5
    assert steps_from(0.0, 100) == 0
    assert steps_from(1.0, 100) == 100
