"""Which prediction type and noise schedule a run trains: what the checkpoint says against what is asked for.

`decide` is the whole policy, without files. A checkpoint that says its type is not trained to another one unless that
is asked for by name; one that says nothing takes what is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.diffusion.targets import PredictionType
from library.errors import UserError
from library.log import get_logger
from library.models import checkpoint
from library.models.prediction import Stated, has_zero_terminal_snr
from library.training.objective import Objective

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.bundle import ModelBundle

log = get_logger(__name__)


@dataclass(frozen=True)
class Asked:
    """What the run's options ask for; None asks for nothing."""

    prediction_type: PredictionType | None = None
    zero_terminal_snr: bool | None = None
    flow_shift: float | None = None
    allow_change: bool = False


@dataclass(frozen=True)
class Decision:
    """What the run trains, and the sentences about it. flow_shift is None unless the type is rectified_flow."""

    prediction_type: PredictionType
    zero_terminal_snr: bool = False
    flow_shift: float | None = None
    infos: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def decide(stated: Stated, asked: Asked, *, where: str) -> Decision:
    """Settle type and schedule; UserError where the checkpoint says one thing and the options another.

    where names the checkpoint in errors. The table of cases: docs/formats.md, "Prediction type".
    """
    infos: list[str] = []
    warnings: list[str] = []
    kind = _type(stated, asked, infos, warnings, where=where)
    zero_snr = _zero_terminal_snr(kind, stated, asked, infos, warnings, where=where)
    shift = None
    if kind == "rectified_flow":
        shift = asked.flow_shift or (stated.flow_shift if stated.prediction_type == kind else None) or 1.0
    elif asked.flow_shift is not None:
        raise UserError(
            f"flow_shift acts on rectified flow only, and the model predicts {kind}",
            where=where,
            fix="remove --flow_shift, or set --prediction_type rectified_flow",
        )
    return Decision(kind, zero_snr, shift, tuple(infos), tuple(warnings))


def _type(stated: Stated, asked: Asked, infos: list[str], warnings: list[str], *, where: str) -> PredictionType:
    own, wanted = stated.prediction_type, asked.prediction_type
    if own is None and stated.where:
        warnings.append(f"the checkpoint's prediction type is not understood: {stated.where}")
    if own is not None and wanted not in (None, own):
        if not asked.allow_change:
            raise UserError(
                f"the checkpoint is a model of {own} ({stated.where}), and the options ask for {wanted}",
                where=where,
                fix="remove --prediction_type and --v_parameterization to train it as it is, or add "
                f"--allow_prediction_type_change to turn it into a model of {wanted}",
            )
        warnings.append(f"the checkpoint is a model of {own} ({stated.where}): it is turned into one of {wanted}")
        return wanted or own
    if asked.allow_change and asked.zero_terminal_snr is not False:
        infos.append("allow_prediction_type_change has no effect: the prediction type does not change")
    if wanted is not None:
        if own is None:
            infos.append(f"training {wanted}, as the options say: the checkpoint does not say what it predicts")
        return wanted
    if own is not None and own != "epsilon":
        infos.append(f"training {own}: the checkpoint says so {stated.where}")
    return own or "epsilon"


def _zero_terminal_snr(
    kind: PredictionType, stated: Stated, asked: Asked, infos: list[str], warnings: list[str], *, where: str
) -> bool:
    if kind == "rectified_flow":
        if asked.zero_terminal_snr:
            raise UserError(
                "zero_terminal_snr cannot act: the checkpoint is a model of rectified flow, which ends in pure noise "
                "by itself",
                where=where,
                fix="remove --zero_terminal_snr",
            )
        return False
    # A model that is turned into another one leaves its schedule behind: it was made for the old type.
    own = stated.zero_terminal_snr and stated.prediction_type in (None, kind)
    if own and asked.zero_terminal_snr is False and asked.allow_change:
        warnings.append("zero terminal SNR is switched off, although the checkpoint was trained with it")
        return False
    if own and not asked.zero_terminal_snr:
        infos.append("zero terminal SNR is on, because the checkpoint says so")
    zero_snr = own or bool(asked.zero_terminal_snr)
    if zero_snr and kind == "epsilon":
        warnings.append(
            "zero terminal SNR with epsilon: at the last step the noisy latent is the noise itself, so there is "
            "nothing to learn; it is made for v-prediction"
        )
    return zero_snr


def asked_for(cfg: RunConfig) -> Asked:
    """What the options ask for. A zero_terminal_snr that is set to false counts only where a change is allowed."""
    model = cfg.model
    kind = "v_prediction" if model.v_parameterization else model.prediction_type
    zero_snr = model.zero_terminal_snr if cfg.is_given("zero_terminal_snr") else None
    # What the checkpoint says is about its own U-Net, not about one that is trained from scratch.
    is_new = "finetune" in cfg.groups and bool(cfg.finetune.unet_config)
    return Asked(kind, zero_snr, model.flow_shift, model.allow_prediction_type_change or is_new)  # type: ignore[arg-type]


def early_decision(cfg: RunConfig) -> Decision:
    """The decision from the checkpoint's header alone, before its weights are read; nothing is logged.

    Where the header cannot be read alone nothing is judged yet, and the model is taken for the most common one.
    """
    stated = checkpoint.read_stated(cfg.model.pretrained_model_name_or_path or "")
    return Decision("epsilon") if stated is None else _decided(cfg, stated)


def settle(cfg: RunConfig, bundle: ModelBundle) -> None:
    """Decide for the loaded checkpoint, say so, and put type and schedule into the bundle."""
    decision = _decided(cfg, bundle.stated)
    for sentence in decision.infos:
        log.info(sentence)
    for sentence in decision.warnings:
        log.warning(sentence)
    bundle.set_prediction(
        decision.prediction_type, zero_terminal_snr=decision.zero_terminal_snr, flow_shift=decision.flow_shift
    )


def effective(flat: Mapping[str, Any], bundle: ModelBundle) -> dict[str, Any]:
    """The settings by flag name, with what was found in the checkpoint in the place of what was asked for."""
    zero_snr = has_zero_terminal_snr(bundle.prediction_type, bundle.schedule)
    return {**flat, "zero_terminal_snr": zero_snr}


def _decided(cfg: RunConfig, stated: Stated) -> Decision:
    where = f"--pretrained_model_name_or_path {cfg.model.pretrained_model_name_or_path}"
    decision = decide(stated, asked_for(cfg), where=where)
    Objective.of(cfg).check(decision.prediction_type)
    return decision
