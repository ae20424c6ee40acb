"""Prediction types through the real scripts: found, refused, trained, drawn, written down."""

import pytest
from PIL import Image
from safetensors import safe_open

import sdxl_gen_img
import sdxl_train_network
from library.models import checkpoint
from library.models.families import sdxl
from tests.e2e.conftest import arguments, log_of

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # diffusers and NumPy 2
QUICK = ("--network_train_unet_only", "--max_train_steps=2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Single files of the tiny model that say they are of another type."""
    folder = tmp_path_factory.mktemp("models")
    bundle = checkpoint.load_bundle("tiny")
    bundle.set_prediction("v_prediction", zero_terminal_snr=True)
    sdxl.save(bundle, folder / "v.safetensors")
    bundle.set_prediction("rectified_flow", flow_shift=2.5)
    sdxl.save(bundle, folder / "flow.safetensors")
    return folder


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle --s 2 --w 64 --h 64 --d 1\n")
    return f"--sample_prompts={path}"


def test_a_velocity_checkpoint_is_trained_as_one_without_a_flag(train, models, prompts, capfd):
    model = f"--pretrained_model_name_or_path={models / 'v.safetensors'}"
    output = train("out", model, *QUICK, prompts, "--sample_every_n_steps=2")
    told = capfd.readouterr().err
    assert "training v_prediction: the checkpoint says so by its tensor v_pred" in told
    assert "zero terminal SNR is on" in told
    found = header(output / "net.safetensors")
    assert found["modelspec.prediction_type"] == "v" and found["ss_zero_terminal_snr"] == "True"
    assert len(list((output / "sample").glob("*.png"))) == 1
    assert all(record["loss"] > 0 for record in log_of(output) if "loss" in record)


def test_noise_is_turned_into_flow_on_purpose_only(pictures, tmp_path, prompts, capfd):
    flags = ("--prediction_type=rectified_flow", "--flow_shift=3", *QUICK, prompts, "--sample_every_n_steps=2")
    assert sdxl_train_network.main(arguments(pictures, tmp_path / "no", *flags)) == 2
    told = capfd.readouterr().err
    assert "epsilon" in told and "--allow_prediction_type_change" in told
    allow = "--allow_prediction_type_change"
    assert sdxl_train_network.main(arguments(pictures, tmp_path / "no", *flags, allow, "--sample_sampler=lms")) == 2
    assert "lms cannot draw a model of rectified flow" in capfd.readouterr().err
    assert not list((tmp_path / "no").glob("*.safetensors"))
    assert sdxl_train_network.main(arguments(pictures, tmp_path / "out", *flags, allow)) == 0
    assert "is turned into one of rectified_flow" in capfd.readouterr().err
    found = header(tmp_path / "out" / "net.safetensors")
    assert found["modelspec.prediction_type"] == "rectified_flow" and found["ss_zero_terminal_snr"] == "False"
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1


def test_the_generator_draws_what_the_checkpoint_says(models, tmp_path, capfd):
    def draw(name, *flags):
        out = tmp_path / name
        argv = ["--prompt", "a red circle", "--steps", "3", "--seed", "1", "--W", "64", "--H", "64", *flags]
        code = sdxl_gen_img.main([*argv, "--outdir", str(out)])
        return code, [Image.open(path).tobytes() for path in sorted(out.glob("*.png"))], capfd.readouterr().err

    flow = str(models / "flow.safetensors")
    code, (own,), told = draw("a", "--ckpt", flow)
    assert code == 0 and "drawing as rectified_flow" in told
    assert draw("b", "--ckpt", flow, "--flow_shift", "1")[1] != [own]
    code, _, told = draw("c", "--ckpt", flow, "--zero_terminal_snr")
    assert code == 2 and "zero_terminal_snr cannot act" in told
    velocity = str(models / "v.safetensors")
    code, (own,), told = draw("d", "--ckpt", velocity)
    assert code == 0 and "drawing as v_prediction" in told
    assert draw("e", "--ckpt", velocity, "--no_zero_terminal_snr")[1] != [own]
    code, _, told = draw("f", "--ckpt", velocity, "--sampler", "pndm", "--steps", "4")
    assert code == 2 and "pndm cannot draw" in told
