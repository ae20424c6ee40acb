"""As what the generator draws a model: the checkpoint's word, and the options' above it."""

import logging
from dataclasses import dataclass, field

import pytest

from library.config.cli import make_config
from library.errors import UserError
from library.inference.prediction import settle
from library.models.prediction import Stated

EPS, V, FLOW = "epsilon", "v_prediction", "rectified_flow"


@dataclass
class Bundle:
    """A bundle as `settle` sees it; keeps what is put into it."""

    stated: Stated
    told: tuple = field(default=())

    @property
    def prediction_type(self):
        return self.stated.prediction_type or EPS

    def set_prediction(self, kind, *, zero_terminal_snr, flow_shift):
        self.told = (kind, zero_terminal_snr, flow_shift)


def settled(stated, **options):
    bundle = Bundle(stated)
    settle(make_config("sdxl_gen_img", ckpt="tiny", prompt="x", **options), bundle)
    return bundle.told


NOTHING, NOISE, ZERO = Stated(), Stated(EPS, where="x"), Stated(V, True, where="x")
FLOWS = Stated(FLOW, flow_shift=3.0, where="x")


@pytest.mark.parametrize(
    ("stated", "options", "expected", "warned"),
    [
        (NOTHING, {}, (EPS, False, None), False),
        (NOTHING, {"v_parameterization": True}, (V, False, None), False),
        (NOTHING, {"prediction_type": FLOW, "flow_shift": 2.0}, (FLOW, False, 2.0), False),
        (NOISE, {"v_parameterization": True, "zero_terminal_snr": True}, (V, True, None), True),
        (ZERO, {}, (V, True, None), False),
        (ZERO, {"zero_terminal_snr": False}, (V, False, None), False),
        (ZERO, {"prediction_type": EPS}, (EPS, False, None), True),
        (FLOWS, {}, (FLOW, False, 3.0), False),
        (FLOWS, {"flow_shift": 1.5}, (FLOW, False, 1.5), False),
        (Stated(zero_terminal_snr=True), {"v_parameterization": True}, (V, True, None), False),
    ],
)
def test_the_options_win_and_say_so(caplog, stated, options, expected, warned):
    with caplog.at_level(logging.INFO):
        assert settled(stated, **options) == expected
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert bool(warnings) == warned


@pytest.mark.parametrize(
    ("stated", "options"),
    [(FLOWS, {"zero_terminal_snr": True}), (ZERO, {"flow_shift": 2.0}), (NOTHING, {"flow_shift": 2.0})],
)
def test_what_cannot_act_is_refused(stated, options):
    with pytest.raises(UserError, match="cannot act: the model predicts"):
        settled(stated, **options)
