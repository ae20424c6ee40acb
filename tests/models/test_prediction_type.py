"""How files say their prediction type and schedule, and that what is saved says it again."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models import checkpoint
from library.models.bundle import ModelBundle
from library.models.families import sdxl
from library.models.prediction import Stated, flow_shift_of, of_scheduler, of_single_file, schedule_for

EPS, V, FLOW = "epsilon", "v_prediction", "rectified_flow"


@pytest.mark.parametrize(
    ("keys", "header", "expected"),
    [
        ((), {}, (None, False)),
        ((), {"modelspec.prediction_type": "epsilon"}, (EPS, False)),
        ((), {"modelspec.prediction_type": "v"}, (V, False)),
        ((), {"modelspec.prediction_type": "V-Prediction"}, (V, False)),
        ((), {"modelspec.predict_key": "v"}, (V, False)),
        ((), {"modelspec.prediction_type": "rectified_flow"}, (FLOW, False)),
        ((), {"modelspec.prediction_type": "sample"}, (None, False)),
        (("v_pred",), {}, (V, False)),
        (("v_pred", "ztsnr"), {}, (V, True)),
        (("ztsnr",), {}, (None, True)),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, (V, False)),
        (("rectified_flow",), {"modelspec.prediction_type": "epsilon"}, (FLOW, False)),
        (("model.diffusion_model.v_pred",), {}, (None, False)),
    ],
)
def test_what_single_files_say(keys, header, expected):
    stated = of_single_file(["model.x", *keys], header, where="x")
    assert (stated.prediction_type, stated.zero_terminal_snr) == expected
    assert bool(stated.where) == bool(header or set(keys) & {"v_pred", "rectified_flow"})


@pytest.mark.parametrize("shift", ["3.5", None, "x", "-1", "0", "inf", "nan"])
def test_the_shift_in_a_header_is_read_if_it_is_one(shift):
    header = {"rectified_flow.shift": shift} if shift else {}
    assert of_single_file(["rectified_flow"], header, where="x").flow_shift == (3.5 if shift == "3.5" else None)


@pytest.mark.parametrize("keys", [("edm_mean", "edm_std"), ("edm_vpred.sigma_max",), ("v_pred", "edm_vpred.sigma_min")])
def test_edm_files_are_refused(keys):
    with pytest.raises(UserError, match="EDM"):
        of_single_file(keys, {}, where="x")


def test_two_markers_contradict_each_other():
    with pytest.raises(UserError, match="two prediction types"):
        of_single_file(["v_pred", "rectified_flow"], {}, where="x")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (None, False, None)),
        ({"prediction_type": "epsilon"}, (EPS, False, None)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, (V, True, None)),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, (FLOW, False, 3.0)),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 2.0}, (FLOW, False, 2.0)),
        ({"prediction_type": "flow_prediction"}, (FLOW, False, None)),
    ],
)
def test_what_schedulers_say(config, expected):
    stated = of_scheduler(config, where="x")
    assert (stated.prediction_type, stated.zero_terminal_snr, stated.flow_shift) == expected


@pytest.mark.parametrize("config", [{"prediction_type": "sample"}, {"_class_name": "EDMDPMSolverMultistepScheduler"}])
def test_schedulers_of_other_models_are_refused(config):
    with pytest.raises(UserError):
        of_scheduler(config, where="x")


SAVED = [(EPS, {}), (EPS, {"zero_terminal_snr": True}), (V, {}), (V, {"zero_terminal_snr": True})]
SAVED += [(FLOW, {}), (FLOW, {"flow_shift": 3.15})]
MARKERS = [set(), {"ztsnr"}, {"v_pred"}, {"v_pred", "ztsnr"}, {"rectified_flow"}, {"rectified_flow"}]


@pytest.mark.parametrize(("kind", "more", "markers"), [(*saved, m) for saved, m in zip(SAVED, MARKERS, strict=True)])
def test_what_is_saved_says_the_same_when_it_is_loaded(half_bundle: ModelBundle, tmp_path: Path, kind, more, markers):
    half_bundle.set_prediction(kind, **more)
    try:
        sdxl.save(half_bundle, tmp_path / "one.safetensors", metadata={"modelspec.prediction_type": "stale"})
        sdxl.save(half_bundle, tmp_path / "many", save_as="diffusers")
    finally:
        schedule = half_bundle.schedule
        half_bundle.set_prediction("epsilon")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert set(file.keys()) & {"v_pred", "ztsnr", "rectified_flow"} == markers
        assert file.metadata()["modelspec.prediction_type"] == {V: "v"}.get(kind, kind)
    for name in ("one.safetensors", "many"):
        stated = checkpoint.read_stated(str(tmp_path / name))
        assert stated is not None and stated.where
        assert (stated.prediction_type, stated.zero_terminal_snr) == (kind, more.get("zero_terminal_snr", False))
        assert stated.flow_shift == (more.get("flow_shift", 1.0) if kind == FLOW else None)
        again = checkpoint.load_bundle(str(tmp_path / name), parts=("vae",))
        assert again.stated == stated and again.prediction_type == kind
        assert checkpoint.read_arch(str(tmp_path / name)) == half_bundle.arch
        assert torch.equal(again.schedule.signal_N, schedule.signal_N)
    config = json.loads((tmp_path / "many" / "scheduler" / "scheduler_config.json").read_text())
    index = json.loads((tmp_path / "many" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", config["_class_name"]]


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 3.15, 12.5])
def test_the_shift_of_a_flow_can_be_read_off_its_table(shift):
    assert flow_shift_of(schedule_for(FLOW, flow_shift=shift)) == shift


def test_a_saved_scheduler_is_one_that_diffusers_builds(half_bundle: ModelBundle, tmp_path: Path):
    for kind, more, expected in (
        (V, {"zero_terminal_snr": True}, EulerDiscreteScheduler),
        (FLOW, {"flow_shift": 3.0}, DPMSolverMultistepScheduler),
    ):
        half_bundle.set_prediction(kind, **more)
        try:
            sdxl.save(half_bundle, tmp_path / kind, save_as="diffusers")
        finally:
            half_bundle.set_prediction("epsilon")
        scheduler = expected.from_pretrained(tmp_path / kind, subfolder="scheduler")
        scheduler.set_timesteps(4)
        assert 998 <= int(scheduler.timesteps[0]) <= 999


def test_pytorch_files_and_hub_models_say_nothing_before_they_are_read(tiny_path: Path, tmp_path: Path):
    tensors = {**load_file(tiny_path), "v_pred": torch.zeros(0)}
    with safe_open(tiny_path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "m.safetensors", metadata=metadata)
    torch.save(tensors, tmp_path / "m.ckpt")
    assert checkpoint.read_stated(str(tmp_path / "m.safetensors")) == Stated(V, where="by its tensor v_pred")
    assert checkpoint.read_stated(str(tmp_path / "m.ckpt")) is None
    assert checkpoint.read_stated("somebody/some-model") is None
    assert (
        checkpoint.read_arch("somebody/some-model") is None and checkpoint.read_arch(str(tmp_path / "m.ckpt")) is None
    )
    save_file(
        {key: value for key, value in tensors.items() if "embedders.0" not in key}, tmp_path / "l.safetensors", metadata
    )
    with pytest.raises(UserError, match="text encoder 1"):
        checkpoint.read_arch(str(tmp_path / "l.safetensors"))
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.read_stated(str(tmp_path / "n.safetensors"))
