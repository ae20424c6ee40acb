"""What a checkpoint says about its prediction type and noise schedule, and how saved files say it.

Single files say it twice: in the header (`modelspec.prediction_type`; ComfyUI writes `modelspec.predict_key`) and,
since most programs look there, by empty marker tensors: `v_pred`, `ztsnr` (zero terminal SNR) and `rectified_flow`. The
first two are those that ComfyUI and others know; there is no agreed marker for SDXL models of rectified flow, so the
third is this suite's own. diffusers folders say it in their scheduler's configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.diffusion.schedule import NoiseSchedule
from library.diffusion.targets import PredictionType
from library.errors import UserError

MARKERS = {"v_pred": "v_prediction", "rectified_flow": "rectified_flow"}
ZERO_SNR_MARKER = "ztsnr"
FLOW_SHIFT = "rectified_flow.shift"  # header metadata: the shift that a model of rectified flow was trained with
_EDM_MARKERS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_HEADER_FIELDS = ("modelspec.prediction_type", "modelspec.predict_key")
_SPELLINGS: dict[str, PredictionType] = {
    "epsilon": "epsilon", "eps": "epsilon",
    "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction", "v_pred": "v_prediction",
    "rectified_flow": "rectified_flow", "flow": "rectified_flow", "flow_matching": "rectified_flow",
    "flow_prediction": "rectified_flow",
}  # fmt: skip
_FOLDER_TYPES = "only epsilon, v_prediction and rectified flow models can be used"


@dataclass(frozen=True)
class Stated:
    """What a checkpoint says: a type (None: nothing), zero terminal SNR, a flow's shift, and the place it says so.

    flow_shift is None where nothing is said about it. where reads on from "the checkpoint says so", e.g. "by its
    tensor v_pred"; without a type it may tell why what is there was not understood.
    """

    prediction_type: PredictionType | None = None
    zero_terminal_snr: bool = False
    flow_shift: float | None = None
    where: str = ""


def of_single_file(keys: Iterable[str], metadata: Mapping[str, str], *, where: str) -> Stated:
    """What a single file says; marker tensors win over the header, which merges copy from one of their models.

    Raises UserError for EDM models, whose noise schedule is another one (Playground v2.5, CosXL).
    """
    markers = set(keys) & {*MARKERS, ZERO_SNR_MARKER, *_EDM_MARKERS}
    if edm := sorted(markers & set(_EDM_MARKERS)):
        raise _other_schedule("an EDM model (as Playground v2.5 or CosXL)", f"it holds the tensor {edm[0]}", where)
    zero_snr, shift = ZERO_SNR_MARKER in markers, _number(metadata.get(FLOW_SHIFT))
    if {"v_pred", "rectified_flow"} <= markers:
        raise UserError(
            "the checkpoint says two prediction types: it holds the tensors v_pred and rectified_flow",
            where=where,
            fix="remove one of the two empty tensors",
        )
    for marker, kind in MARKERS.items():
        if marker in markers:
            return Stated(_SPELLINGS[kind], zero_snr, shift, f"by its tensor {marker}")
    for field in _HEADER_FIELDS:
        if text := metadata.get(field):
            found = _SPELLINGS.get(text.strip().lower())
            told = f"in its header: {field} = {text}"
            return Stated(found, zero_snr, shift, told if found else f"{told} is not known here")
    return Stated(None, zero_snr, shift)


def of_scheduler(config: Mapping[str, Any], *, where: str) -> Stated:
    """What a diffusers scheduler's configuration says. Raises UserError for models that are of another kind."""
    class_name = str(config.get("_class_name", ""))
    if class_name.startswith("EDM"):
        raise _other_schedule("an EDM model", f"its scheduler is {class_name}", where)
    zero_snr = bool(config.get("rescale_betas_zero_snr", False))
    if class_name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        shift = config.get("shift" if class_name.startswith("FlowMatch") else "flow_shift")
        return Stated("rectified_flow", False, _number(shift), f"by its scheduler, {class_name or 'with flow sigmas'}")
    text = config.get("prediction_type")
    if text is None:
        return Stated(None, zero_snr)
    if text not in ("epsilon", "v_prediction", "flow_prediction"):
        raise UserError(f"the model predicts {text!r}", where=where, fix=_FOLDER_TYPES)
    return Stated(_SPELLINGS[text], zero_snr, None, f"in its scheduler's configuration: prediction_type = {text}")


def schedule_for(
    prediction_type: PredictionType, *, zero_terminal_snr: bool = False, flow_shift: float | None = None
) -> NoiseSchedule:
    """The noise schedule of SDXL for a prediction type; flow_shift None is 1 (no shift)."""
    if prediction_type == "rectified_flow":
        assert not zero_terminal_snr, "rectified flow ends in noise by itself"
        return NoiseSchedule.rectified_flow(shift=1.0 if flow_shift is None else flow_shift)
    return NoiseSchedule.scaled_linear(zero_terminal_snr=zero_terminal_snr)


def markers_of(prediction_type: PredictionType, schedule: NoiseSchedule) -> dict[str, Tensor]:
    """The empty tensors that mark a model in a single file."""
    names = [marker for marker, kind in MARKERS.items() if kind == prediction_type]
    if has_zero_terminal_snr(prediction_type, schedule):
        names.append(ZERO_SNR_MARKER)
    return {name: torch.empty(0) for name in names}


def header_of(prediction_type: PredictionType, schedule: NoiseSchedule) -> dict[str, str]:
    """The header entries of a single file: the type as modelspec spells it, and a flow's shift."""
    spelled: str = "v" if prediction_type == "v_prediction" else prediction_type
    header: dict[str, str] = {"modelspec.prediction_type": spelled}
    if prediction_type == "rectified_flow":
        header[FLOW_SHIFT] = f"{flow_shift_of(schedule):g}"
    return header


def scheduler_of(prediction_type: PredictionType, schedule: NoiseSchedule) -> dict[str, Any]:
    """The scheduler configuration of a diffusers folder, one that StableDiffusionXLPipeline can draw with.

    epsilon: as SDXL is published. Zero terminal SNR: rescaled, and with trailing timesteps, which begin at the last
    one (Lin et al. 2023). Rectified flow: DPM-Solver++ on flow sigmas, since that pipeline cannot run the FlowMatch
    classes, which neither scale start noise nor model inputs.
    """
    shared = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if prediction_type == "rectified_flow":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift_of(schedule)}
        return {"_class_name": "DPMSolverMultistepScheduler", **shared, **flow}
    euler = {"interpolation_type": "linear", "use_karras_sigmas": False, "steps_offset": 1}
    config = {"_class_name": "EulerDiscreteScheduler", **shared, **euler, "prediction_type": prediction_type}
    if schedule.ends_in_noise:
        return config | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    return config | {"timestep_spacing": "leading"}


def has_zero_terminal_snr(prediction_type: PredictionType, schedule: NoiseSchedule) -> bool:
    """Whether a model of noise or velocity is on the rescaled schedule; rectified flow is never called so."""
    return prediction_type != "rectified_flow" and schedule.ends_in_noise


def flow_shift_of(schedule: NoiseSchedule) -> float:
    """The shift of a schedule of rectified flow, to 9 digits, from its first step: s' (1 - s) / (s (1 - s'))."""
    first = 1.0 / schedule.num_steps
    shift = float(schedule.sigma_N[0] / schedule.signal_N[0]) * (1.0 - first) / first
    return float(f"{shift:.9g}")


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if 0 < value < float("inf") else None


def _other_schedule(what: str, because: str, where: str) -> UserError:
    return UserError(
        f"this is {what}: {because}",
        where=where,
        fix="its noise schedule is another one; " + _FOLDER_TYPES,
    )
