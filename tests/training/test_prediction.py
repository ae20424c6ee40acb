"""The policy of prediction types: what a checkpoint says against what the options ask for, case by case."""

import itertools
from types import SimpleNamespace

import pytest

from library.config.choices import PREDICTION_TYPES
from library.config.cli import make_config
from library.errors import UserError
from library.models.prediction import Stated
from library.training import prediction
from library.training.prediction import Asked, Decision, decide

EPS, V, FLOW = PREDICTION_TYPES
MAYBE = (None, EPS, V, FLOW)


def said(kind, **more):
    return Stated(kind, where="by its tensor x", **more)


def settled(stated, asked) -> Decision:
    return decide(stated, asked, where="the checkpoint's name")


def refused(stated, asked) -> UserError:
    with pytest.raises(UserError) as caught:
        settled(stated, asked)
    assert "the checkpoint's name" in str(caught.value) and caught.value.problems[0].fix
    return caught.value


@pytest.mark.parametrize(("own", "wanted"), list(itertools.product(MAYBE, MAYBE)))
def test_type_table(own, wanted):
    """Nothing said: what is asked for; nothing asked: what is said; two different answers: an error."""
    stated = said(own) if own else Stated()
    asked = Asked(wanted)
    if own and wanted and own != wanted:
        text = str(refused(stated, asked))
        assert own in text and wanted in text and "by its tensor x" in text
        assert "--allow_prediction_type_change" in text
        changed = settled(stated, Asked(wanted, allow_change=True))
        assert changed.prediction_type == wanted and own in changed.warnings[0] and wanted in changed.warnings[0]
        return
    decision = settled(stated, asked)
    assert decision.prediction_type == (wanted or own or EPS)
    assert not decision.warnings
    talks = (own is None and wanted is not None) or (wanted is None and own in (V, FLOW))
    assert bool(decision.infos) == talks
    assert decision.flow_shift == (1.0 if decision.prediction_type == FLOW else None)
    assert not decision.zero_terminal_snr


def test_an_unknown_word_in_the_header_is_reported_and_counts_as_nothing():
    stated = Stated(where="in its header: modelspec.prediction_type = sample is not known here")
    decision = settled(stated, Asked())
    assert decision.prediction_type == EPS and "= sample is not known" in decision.warnings[0]
    assert settled(stated, Asked(V)).prediction_type == V


def test_permission_to_change_without_a_change_is_reported():
    for asked in (Asked(allow_change=True), Asked(V, allow_change=True)):
        assert "no effect" in " ".join(settled(said(V), asked).infos)


@pytest.mark.parametrize(
    ("own", "marked", "wanted", "asked", "allow", "on"),
    [
        # own type, marked, wanted type, --zero_terminal_snr, --allow_prediction_type_change -> on
        (V, False, None, None, False, False),
        (V, False, None, True, False, True),
        (V, True, None, None, False, True),
        (V, True, None, True, False, True),
        (V, True, None, False, False, True),  # a file full of defaults asks for nothing
        (V, True, None, False, True, False),
        (None, True, None, None, False, True),
        (None, True, V, None, False, True),
        (None, False, V, True, False, True),
        (V, True, EPS, None, True, False),  # the schedule was made for v
        (V, True, EPS, True, True, True),
        (EPS, False, V, True, True, True),
        (V, True, FLOW, None, True, False),
        (FLOW, True, None, None, False, False),
    ],
)
def test_zero_terminal_snr_table(own, marked, wanted, asked, allow, on):
    stated = said(own, zero_terminal_snr=marked) if own else Stated(zero_terminal_snr=marked)
    decision = settled(stated, Asked(wanted, asked, allow_change=allow))
    assert decision.zero_terminal_snr is on
    found = any("zero terminal SNR is on" in info for info in decision.infos)
    assert found == (on and marked and not asked)
    warned = any("nothing to learn" in warning for warning in decision.warnings)
    assert warned == (on and decision.prediction_type == EPS)
    switched_off = any("switched off" in warning for warning in decision.warnings)
    assert switched_off == (asked is False and allow)


def test_zero_terminal_snr_cannot_act_on_flow():
    assert "rectified flow" in str(refused(said(FLOW), Asked(zero_terminal_snr=True)))
    assert settled(said(FLOW), Asked(zero_terminal_snr=False)).prediction_type == FLOW


@pytest.mark.parametrize(
    ("own", "own_shift", "wanted", "shift", "expected"),
    [
        (FLOW, None, None, None, 1.0),
        (FLOW, 3.0, None, None, 3.0),
        (FLOW, 3.0, None, 2.0, 2.0),
        (None, None, FLOW, 2.0, 2.0),
        (None, None, FLOW, None, 1.0),
        (EPS, 3.0, FLOW, None, 1.0),
        (EPS, None, None, None, None),
    ],
)
def test_shift_table(own, own_shift, wanted, shift, expected):
    stated = said(own, flow_shift=own_shift) if own else Stated()
    assert settled(stated, Asked(wanted, flow_shift=shift, allow_change=True)).flow_shift == expected


@pytest.mark.parametrize("own", [None, EPS, V])
def test_a_shift_is_refused_where_nothing_flows(own):
    assert "flow_shift acts on rectified flow only" in str(refused(said(own) if own else Stated(), Asked(flow_shift=2)))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "1_thing").mkdir()

    def make(**options):
        fixed = {"train_data_dir": str(tmp_path), "output_dir": str(tmp_path), "resolution": 64}
        fixed |= {"pretrained_model_name_or_path": "tiny", "network_module": "networks.lora"}
        return make_config("sdxl_train_network", **fixed | options)

    return make


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, Asked()),
        ({"v_parameterization": False, "zero_terminal_snr": False}, Asked(None, False)),
        ({"v_parameterization": True}, Asked(V)),
        ({"v_parameterization": True, "prediction_type": V}, Asked(V)),
        ({"prediction_type": FLOW, "flow_shift": 3.0}, Asked(FLOW, None, 3.0)),
        ({"zero_terminal_snr": True, "allow_prediction_type_change": True}, Asked(None, True, None, True)),
    ],
)
def test_options_ask(config, options, asked):
    assert prediction.asked_for(config(**options)) == asked


def test_a_mismatch_is_found_in_the_header(config, monkeypatch):
    """The embedded model says epsilon; nothing of it may be loaded to find that out."""
    monkeypatch.setattr("library.models.checkpoint.filled", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"epsilon .*v_prediction"):
        prediction.early_decision(config(v_parameterization=True))
    allowed = config(v_parameterization=True, allow_prediction_type_change=True)
    assert prediction.early_decision(allowed).prediction_type == V
    assert prediction.early_decision(config()) == Decision(EPS)


def test_a_checkpoint_that_cannot_be_asked_early_is_judged_when_it_is_loaded(config, monkeypatch):
    monkeypatch.setattr("library.models.checkpoint.read_stated", lambda name: None)
    cfg = config(flow_shift=2.0)
    assert prediction.early_decision(cfg) == Decision(EPS)
    bundle = SimpleNamespace(
        stated=Stated(FLOW, where="x"), set_prediction=lambda *kind, **more: told.append((kind, more))
    )
    told = []
    prediction.settle(cfg, bundle)
    assert told == [((FLOW,), {"zero_terminal_snr": False, "flow_shift": 2.0})]
    bundle.stated = Stated(V, where="x")
    with pytest.raises(UserError, match="flow_shift"):
        prediction.settle(cfg, bundle)


@pytest.mark.parametrize("option", [{"min_snr_gamma": 5.0}, {"p2_gamma": 1.0}, {"dream_training": True}])
def test_formulas_of_noise_are_refused_for_flow(config, option):
    cfg = config(prediction_type=FLOW, allow_prediction_type_change=True, **option)
    with pytest.raises(UserError, match=f"{next(iter(option))}.* epsilon and v, not for rectified_flow"):
        prediction.early_decision(cfg)
    assert prediction.early_decision(config(**option)).prediction_type == EPS
