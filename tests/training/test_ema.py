"""The average of the weights: diffusers' numbers, intervals, skipped steps, exact swapping and resuming."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st

from library.training.ema import Decay, Ema

SHAPES = {"down": (3, 4), "up": (5,), "scale": ()}


def _params(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }


def _train(params, step):
    """Stands in for an optimizer step: large, reproducible moves."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in params.values():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype))


def _run(ema, params, steps, *, skipped=()):
    for step in steps:
        if step not in skipped:
            _train(params, step)
        ema.update(step, was_skipped=torch.tensor(float(step in skipped)))


def _copy(values):
    return {name: value.detach().clone() for name, value in values.items()}


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


CURVES = [
    Decay(),
    Decay(highest=0.5, lowest=0.3),
    Decay(highest=0.99, after=4),
    Decay(highest=0.9, warmup=True, inv_gamma=2.0, power=0.75, after=2),
]


def _reference(params, curve):
    return EMAModel(
        list(params.values()),
        decay=curve.highest,
        min_decay=curve.lowest,
        update_after_step=curve.after,
        use_ema_warmup=curve.warmup,
        inv_gamma=curve.inv_gamma,
        power=curve.power,
    )


@pytest.mark.parametrize("curve", CURVES)
def test_averages_are_those_of_diffusers(curve):
    params = _params()
    ema, reference = Ema(params, curve), _reference(params, curve)
    for step in range(1, 31):
        _train(params, step)
        ema.update(step)
        reference.step(params.values())
        assert curve.at(step) == pytest.approx(reference.cur_decay_value, abs=1e-12)
        for average, expected in zip(ema.average().values(), reference.shadow_params, strict=True):
            torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)


def test_the_curves_by_hand():
    assert [Decay().at(step) for step in (1, 2, 3)] == [0.0, 2 / 11, 3 / 12]
    assert Decay(warmup=True, inv_gamma=2, power=0.5).at(4) == pytest.approx(1 - (1 + 3 / 2) ** -0.5)
    assert Decay(after=10).at(11) == 0.0 and Decay(after=10).at(12) == 2 / 11
    assert Decay(highest=0.7).at(1000) == 0.7 and Decay(lowest=0.6).at(2) == 0.6 and Decay(lowest=0.6).at(1) == 0.0


@given(interval=st.integers(1, 6), decay=st.floats(0, 1), last=st.integers(1, 12))
def test_an_update_after_several_steps_keeps_the_product_of_their_decays(interval, decay, last):
    params, curve = _params(), Decay(highest=decay, lowest=decay)
    ema = Ema(params, curve, interval=interval)
    expected = _copy(params)
    for step in range(1, last + 1):
        _train(params, step)
        ema.update(step)
        if step % interval == 0:
            steps = range(step - interval + 1, step + 1)
            kept = torch.tensor([curve.at(s) for s in steps], dtype=torch.float64).prod().item()
            expected = {name: kept * expected[name] + (1 - kept) * p.detach() for name, p in params.items()}
    for name, average in ema.average().items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-5)


def test_constant_weights_are_their_own_average_and_the_horizon_does_not_depend_on_the_interval():
    results = []
    for interval in (1, 4):
        params = {"p": torch.nn.Parameter(torch.zeros(1))}
        ema = Ema(params, Decay(highest=0.9, lowest=0.9), interval=interval)
        ema.update(1) if interval == 1 else [ema.update(step) for step in range(1, 5)]
        params["p"].data.fill_(1.0)
        for step in range(101, 109):
            ema.update(step)
        results.append(ema.average()["p"].item())
    assert results[0] == pytest.approx(1 - 0.9**8) and results[1] == pytest.approx(results[0], rel=1e-6)


@pytest.mark.parametrize("interval", [1, 3])
def test_a_skipped_step_does_nothing_to_the_average(interval):
    params = _params()
    ema = Ema(params, Decay(highest=0.9, lowest=0.9), interval=interval)
    _run(ema, params, range(1, 7))
    before = _copy(ema.average())
    _run(ema, params, range(7, 7 + 3), skipped=range(7, 10))
    assert _same(before, ema.average())
    # In an interval with one skipped step of three, two decays count.
    _run(ema, params, range(10, 13), skipped=[11])
    if interval == 3:
        for name, average in ema.average().items():
            expected = 0.81 * before[name] + 0.19 * params[name].detach()
            torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [4, 6, 7])
def test_resuming_within_an_interval_is_exact(cut):
    curve = Decay(highest=0.97, warmup=True)
    whole_params = _params()
    whole = Ema(whole_params, curve, interval=3)
    _run(whole, whole_params, range(1, 15), skipped=[5, 8])

    params = _params()
    first = Ema(params, curve, interval=3)
    _run(first, params, range(1, cut + 1), skipped=[5])
    state = torch.load(_saved(first), weights_only=True)
    with torch.no_grad():
        params = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    second = Ema(params, curve, interval=3)
    second.load_state_dict(state)
    _run(second, params, range(cut + 1, 15), skipped=[5, 8])
    assert _same(whole.average(), second.average())


def _saved(ema):
    import io

    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_weights_are_back_bit_for_bit_also_after_an_error(dtype, on_cpu):
    params = _params(dtype=dtype)
    with torch.no_grad():
        params["up"][0] = float("nan")
    ema = Ema(params, Decay(), on_cpu=on_cpu)
    for p in params.values():
        with torch.no_grad():
            p.add_(1.0)
    live = {name: p.detach().clone().view(torch.uint8 if p.dim() else p.dtype) for name, p in params.items()}
    average = _copy(ema.average())
    with pytest.raises(ZeroDivisionError), ema.swapped():
        assert all(torch.equal(p.detach().nan_to_num(), average[n].to(dtype).nan_to_num()) for n, p in params.items())
        raise ZeroDivisionError
    for name, p in params.items():
        assert torch.equal(p.detach().view(torch.uint8 if p.dim() else p.dtype), live[name])
    assert all(torch.equal(ema.average()[name].nan_to_num(), average[name].nan_to_num()) for name in average)
    with ema.swapped():
        pass  # it can be swapped again


def test_the_average_is_float32_and_moves_where_bfloat16_would_not():
    params = {"p": torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))}
    ema = Ema(params, Decay(highest=0.9999, lowest=0.9999))
    ema.update(1)
    params["p"].data.fill_(2.0)
    ema.update(2)
    assert ema.average()["p"].dtype == torch.float32
    assert ema.average()["p"].item() == pytest.approx(1.0001, abs=1e-6)


def test_a_state_of_other_parameters_is_refused_and_a_missing_one_begins_anew():
    params = _params()
    ema = Ema(params, Decay())
    _train(params, 1)
    with pytest.raises(ValueError, match="do not fit"):
        ema.load_state_dict({"average": {"p": torch.zeros(1)}, "kept": 1.0})
    assert "begins anew" in ema.start_anew()
    assert _same(ema.average(), _copy(params))
