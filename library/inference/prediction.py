"""As what a model is drawn: what its checkpoint says, unless the options say otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.errors import UserError
from library.log import get_logger

if TYPE_CHECKING:
    from library.config.run_config import RunConfig
    from library.models.bundle import ModelBundle

log = get_logger(__name__)


def settle(cfg: RunConfig, bundle: ModelBundle) -> None:
    """Put the prediction type and schedule in force into the bundle.

    The options win over the checkpoint, with a warning: a network may have turned its base into another type. Raises
    UserError for options that cannot act on the type that was found.
    """
    options, stated = cfg.generate, bundle.stated
    wanted = "v_prediction" if options.v_parameterization else options.prediction_type
    kind = wanted or bundle.prediction_type
    if stated.prediction_type not in (None, kind):
        log.warning(f"drawing as {kind}, although the checkpoint is a model of {stated.prediction_type}")
    elif wanted is None and kind != "epsilon":
        log.info(f"drawing as {kind}: the checkpoint says so {stated.where}")
    flow = kind == "rectified_flow"
    for name, useless in (("zero_terminal_snr", flow), ("flow_shift", not flow)):
        if useless and cfg.get(name):
            raise UserError(f"{name} cannot act: the model predicts {kind}", f"--ckpt {options.ckpt}", f"remove {name}")
    zero_snr = options.zero_terminal_snr
    if stated.zero_terminal_snr and stated.prediction_type in (None, kind) and not cfg.is_given("zero_terminal_snr"):
        zero_snr = True
    shift = options.flow_shift or stated.flow_shift
    bundle.set_prediction(kind, zero_terminal_snr=zero_snr and not flow, flow_shift=shift)  # type: ignore[arg-type]
