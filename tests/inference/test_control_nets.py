"""ControlNets: the same pictures as diffusers', files in every form, and that nothing stays behind."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sdxl_gen_img
from library.config.cli import make_config
from library.config.preps import parse_prep
from library.errors import UserError
from library.inference import launch
from library.inference.control_nets import ControlNet, ControlNets, load_control_nets
from library.inference.effects import DeepShrink, GradualLatent
from library.inference.launch import generate
from library.inference.request import GenRequest
from library.inference.samplers import start_noise
from library.io.safetensors_file import TensorReader, save
from library.models.arch import SDXL
from library.models.control_net import load_control_net
from library.models.keymaps.unet import unet_keymap
from library.sizes import Size

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' deprecations

REQUEST = GenRequest(
    prompt="a red circle", negative="green", size=Size(128, 96), steps=5, scale=4.0, seed=3, sampler="euler"
)
SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(scope="module")
def places(bundle, tmp_path_factory):
    """Two random ControlNets of the tiny model as diffusers' folders, and control images of another size."""
    folder = tmp_path_factory.mktemp("nets")
    for name in "12":
        torch.manual_seed(int(name))
        net = diffusers.ControlNetModel.from_unet(bundle.unet)
        for key, parameter in net.named_parameters():
            if not parameter.any() or key.startswith("controlnet_"):
                torch.nn.init.normal_(parameter, std=0.08)
        net.save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    for name in "ab":
        blocks = np.kron(rng.integers(0, 255, (6, 5, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
        Image.fromarray(blocks).save(folder / f"{name}.png")
    return folder


def weights(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def nets(bundle, places, *names: str, **how) -> ControlNets:
    loaded = [ControlNet.of(load_control_net(str(places / name), bundle.arch), **how) for name in names]
    return ControlNets(loaded)


def following(places, *images: str, **changes) -> GenRequest:
    return replace(REQUEST, control=tuple(str(places / f"{image}.png") for image in images), **changes)


def drawn(bundle, requests, *followers, **how):
    made = generate(bundle, requests, followers=followers, **how)
    return [np.asarray(picture).astype(np.int16) for _, picture in made]


def theirs(pipeline, places, names, images, *, scale=1.0, end=1.0):
    """The picture of diffusers' own pipeline."""
    loaded = [diffusers.ControlNetModel.from_pretrained(places / name) for name in names]
    many = len(loaded) > 1
    pipe = diffusers.StableDiffusionXLControlNetPipeline(
        vae=pipeline.vae, text_encoder=pipeline.text_encoder, text_encoder_2=pipeline.text_encoder_2,
        tokenizer=pipeline.tokenizer, tokenizer_2=pipeline.tokenizer_2, unet=pipeline.unet,
        controlnet=loaded if many else loaded[0], scheduler=diffusers.EulerDiscreteScheduler(**SETTINGS),
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pictures = [Image.open(places / f"{image}.png") for image in images]
    made = pipe(
        prompt=REQUEST.prompt, negative_prompt=REQUEST.negative, image=pictures if many else pictures[0], width=128,
        height=96, num_inference_steps=5, guidance_scale=4.0, controlnet_conditioning_scale=scale,
        control_guidance_end=end, latents=start_noise([torch.Generator().manual_seed(3)], (4, 12, 16)),
        output_type="np",
    ).images[0]  # fmt: skip
    return (made * 255).round()


def test_the_same_picture_as_diffusers_pipeline(bundle, pipeline, places):
    (plain,) = drawn(bundle, [REQUEST])
    one = nets(bundle, places, "1", strength=0.7, ratio=0.5)  # off before call i of 5 when 0.5 < i / 5
    (ours,) = drawn(bundle, [following(places, "a")], one)
    assert np.abs(ours - theirs(pipeline, places, "1", "a", scale=0.7, end=0.6)).mean() < 0.02
    assert np.abs(ours - plain).mean() > 3
    (whole,) = drawn(bundle, [following(places, "a")], nets(bundle, places, "1", strength=0.7))
    assert np.abs(ours - whole).mean() > 0.5
    (both,) = drawn(bundle, [following(places, "a", "b")], nets(bundle, places, "1", "2"))
    wanted = theirs(pipeline, places, "12", "ab", scale=[1.0, 1.0])
    assert np.abs(both - wanted).mean() < 0.02 and np.abs(both - ours).mean() > 1


def test_each_picture_follows_its_own_image_and_the_next_ones_are_left_alone(bundle, places):
    control = nets(bundle, places, "1")
    requests = [REQUEST, following(places, "a"), following(places, "b", negative_scale=1.5), REQUEST]
    plain, a, b, again = drawn(bundle, requests, control)
    assert np.array_equal(plain, again) and np.array_equal(plain, drawn(bundle, [REQUEST])[0])
    assert np.abs(a - plain).mean() > 3 and np.abs(a - b).mean() > 1
    pair = [following(places, "a", negative_scale=1.5), requests[2]]  # three branches of two pictures
    forward, backward = (drawn(bundle, batch, control, batch_size=2) for batch in (pair, pair[::-1]))
    assert np.array_equal(forward[1], backward[0]) and np.array_equal(forward[1], b)
    assert np.array_equal(plain, drawn(bundle, requests[1:2], nets(bundle, places, "1", strength=0.0))[0])


def test_latents_have_the_same_bits_in_every_batch(bundle, places, monkeypatch):
    control, latents, original = nets(bundle, places, "1"), [], launch._drawn

    def noted(*args):
        for made, rows in original(*args):
            latents.append(rows)
            yield made, rows

    monkeypatch.setattr(launch, "_drawn", noted)
    size = Size(64, 64)
    batch = [following(places, "ab"[seed % 2], seed=seed, prompt=f"{seed}", size=size, steps=2) for seed in range(3)]
    for batch_size in (1, 3):
        drawn(bundle, batch, control, batch_size=batch_size)
    assert torch.equal(torch.cat(latents[:3]), latents[3])


def test_images_are_embedded_once_for_each_size(bundle, places):
    (net,) = nets(bundle, places, "1").nets
    sizes = []
    net.embed.register_forward_hook(lambda _, arguments, __: sizes.append(tuple(arguments[0].shape)))
    request = following(places, "a", sampler="euler_a", gradual_latent=GradualLatent(999, 0.5, 0.5))
    grown = replace(request, deep_shrink=DeepShrink(3))
    pictures = drawn(bundle, [request, grown], ControlNets([net]))
    assert sizes == [(1, 3, 48, 64), (1, 3, 96, 128)] * 2
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.3


@pytest.mark.parametrize(("ratio", "acts"), [(1.0, 4), (0.5, 3), (0.25, 2), (0.0, 1)])
def test_a_network_acts_in_its_share_of_the_steps(bundle, places, ratio, acts):
    control, calls = nets(bundle, places, "1", ratio=ratio), []  # off before call i of 4 when ratio < i / 4
    control.nets[0].network.register_forward_hook(lambda *_: calls.append(1))
    drawn(bundle, [following(places, "a", steps=4, scale=1.0, size=Size(64, 64))], control)
    assert len(calls) == acts


def test_lllites_come_first_in_images_strengths_and_ratios(bundle, places):
    (loaded,) = nets(bundle, places, "1").nets
    (second,) = drawn(bundle, [following(places, "a", "b", steps=1)], ControlNets([loaded], first=1))
    assert np.array_equal(second, drawn(bundle, [following(places, "b", steps=1)], ControlNets([loaded]))[0])
    lllite = str(weights(places / "1"))  # it is not opened here
    cfg = make_config(
        "sdxl_gen_img", ckpt="tiny", prompt="a", control_net_lllite_models=[lllite], guide_image_path=[lllite],
        control_net_models=[str(places / "1"), str(places / "2")], control_net_preps=["canny_1_2"],
        control_net_multipliers=[0.3, 0.7], control_net_ratios=[0.2, 0.4, 0.6],
    )  # fmt: skip
    both = load_control_nets(bundle, cfg)
    assert [(net.strength, net.ratio) for net in both.nets] == [(0.7, 0.4), (1.0, 0.6)]
    assert [net.prep for net in both.nets] == [parse_prep("canny_1_2"), None] and both.first == 1


def test_images_are_prepared_and_channels_turned(bundle, places):
    network = load_control_net(str(places / "1"), bundle.arch)
    network.register_to_config(controlnet_conditioning_channel_order="bgr")
    net = ControlNet.of(network)
    picture = Image.open(places / "a.png").resize((128, 96), Image.Resampling.LANCZOS)
    wanted = np.asarray(picture)[..., ::-1].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(net.image(str(places / "a.png"), Size(128, 96)).numpy(), wanted, atol=1e-6)
    edges = replace(net, prep=parse_prep("canny_30_90")).image(str(places / "a.png"), Size(128, 96)).numpy()
    lines = cv2.Canny(cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2GRAY), 30, 90)
    assert lines.any() and all(np.array_equal(channel * 255, lines) for channel in edges)


def to_original(key: str) -> str:
    """The original ControlNet's name of a tensor of diffusers'."""
    place, _, tail = key.rpartition(".")
    if place.startswith("controlnet_cond_embedding"):
        layers = ["conv_in", *(f"blocks.{number}" for number in range(6)), "conv_out"]
        return f"input_hint_block.{2 * layers.index(place.split('.', 1)[1])}.{tail}"
    if place.startswith("controlnet_down_blocks"):
        return f"zero_convs.{place.split('.')[1]}.0.{tail}"
    if place == "controlnet_mid_block":
        return f"middle_block_out.0.{tail}"
    return unet_keymap().name(key, reverse=True)


@pytest.mark.parametrize("form", ["diffusers", "original", "original, whole"])
def test_single_files_are_the_same_network(bundle, places, tmp_path, form):
    folder = load_control_net(str(places / "1"), bundle.arch)
    tensors = folder.state_dict()
    if form != "diffusers":
        prefix = "control_model." if "whole" in form else ""
        renamed = {prefix + to_original(key): tensor for key, tensor in tensors.items()}
        from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

        oracle = convert_controlnet_checkpoint(dict(renamed), {"layers_per_block": 2})
        shared = {key for key in oracle if oracle[key] is not None}
        assert len(shared) > 0.9 * len(tensors) and all(torch.equal(oracle[key], tensors[key]) for key in shared)
        tensors = renamed
    save(tensors, tmp_path / "net.safetensors")
    single = load_control_net(str(tmp_path / "net.safetensors"), bundle.arch)
    assert single.state_dict().keys() == folder.state_dict().keys()
    assert all(torch.equal(tensor, folder.state_dict()[key]) for key, tensor in single.state_dict().items())
    config = {key: value for key, value in folder.config.items() if not key.startswith("_")}
    assert all(tuple_of(single.config[key]) == tuple_of(value) for key, value in config.items())


def tuple_of(value):
    return tuple(value) if isinstance(value, list) else value


def test_smaller_variants_without_attention_are_read(bundle, places, tmp_path):
    torch.manual_seed(0)
    config = dict(diffusers.ControlNetModel.from_pretrained(places / "1").config)
    config |= {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"}
    net = diffusers.ControlNetModel.from_config(config)
    save(net.state_dict(), tmp_path / "small.safetensors")
    single = load_control_net(str(tmp_path / "small.safetensors"), bundle.arch)
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in single.state_dict().items())


def changed(tensors: dict, form: str) -> dict:
    """A ControlNet's tensors made into those of something else."""
    if form == "SD 1.5":
        return {key: tensor for key, tensor in tensors.items() if "add_embedding" not in key}
    if form == "union":
        return tensors | {"control_add_embedding.linear_1.weight": torch.ones(2, 2)}
    if form == "Control-LoRA":
        return {"lora_controlnet": torch.ones(1), "input_hint_block.0.weight": torch.ones(2, 2)}
    if form == "cut":
        return {key: tensor for key, tensor in tensors.items() if "mid_block.resnets.0" not in key}
    if form == "NaN":
        return tensors | {"conv_in.bias": torch.full_like(tensors["conv_in.bias"], float("nan"))}
    if form == "more":
        return tensors | {"x.weight": torch.ones(1)}
    names = {
        "LoRA": "lora_unet_x.lora_down.weight",
        "LLLite": "lllite_unet_x",
        "Flux": "double_blocks.0.weight",
        "T2I": "adapter.body.0.weight",
        "checkpoint": "model.diffusion_model.x",
    }
    return {names.get(form, form): torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("form", "what", "fix"),
    [
        ("SD 1.5", "for an earlier model: it takes no size ids", "trained on SDXL"),
        ("union", "for several tasks (union)", "SDXL"),
        ("Control-LoRA", "this is a Control-LoRA", "a whole ControlNet"),
        ("LoRA", "this is a LoRA", "network_weights"),
        ("LLLite", "this is a ControlNet-LLLite", "control_net_lllite_models"),
        ("Flux", "of another family of models", "SDXL"),
        ("T2I", "this is a T2I-Adapter", "ControlNet"),
        ("checkpoint", "this is a whole checkpoint", "as the model"),
        ("x", "nothing in it takes a control image", "SDXL"),
        ("cut", "10 are missing (mid_block.resnets.0.conv1.bias", "get it again"),
        ("more", "1 are not its own (x.weight)", "get it again"),
        ("NaN", '"conv_in.bias" holds values that are not finite', "another save"),
    ],
)
def test_other_files_are_told_apart(bundle, places, tmp_path, form, what, fix):
    with TensorReader(weights(places / "1")) as tensors:
        save(changed(dict(tensors), form), tmp_path / "net.safetensors")
    with pytest.raises(UserError) as caught:
        load_control_net(str(tmp_path / "net.safetensors"), bundle.arch)
    (problem,) = caught.value.problems
    assert what in problem.what and fix in problem.fix and "net.safetensors" in problem.where


def test_networks_for_another_width_are_refused(bundle, places, tmp_path):
    with pytest.raises(UserError, match=r"channels of its levels of this ControlNet are \[32, 64, 80\], the model's"):
        load_control_net(str(places / "1"), SDXL)
    with pytest.raises(UserError, match="of another shape"):
        load_control_net(str(weights(places / "1")), SDXL)
    (tmp_path / "other").mkdir()
    for config, what in (({"_class_name": "UNet2DConditionModel"}, "holds a UNet2D"), ({}, "model without a name")):
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=what):
            load_control_net(str(tmp_path / "other"), bundle.arch)
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    (tmp_path / "other" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "net.pth").write_bytes(b"x")
    for name, what in (("other", "safetensors files only"), ("net.pth", "files only"), ("no", "no such ControlNet")):
        with pytest.raises(UserError, match=what):
            load_control_net(str(tmp_path / name), bundle.arch)


def test_the_script_draws_with_them_and_refuses_wrong_ones_before_loading(places, tmp_path, monkeypatch, capsys):
    argv = f"--ckpt tiny --outdir {tmp_path / 'out'} --steps 1 --W 64 --H 64 --scale 1 --seed 1 --prompt red".split()
    argv += ["--control_net_models", str(places / "1"), str(weights(places / "2")), "--sequential_file_name"]
    argv += ["--guide_image_path", str(places / "a.png"), str(places / "b.png"), "--control_net_preps", "none", "canny"]
    pictures = []
    for strengths in ("1", "1 0", "0 1", "0 0"):
        assert sdxl_gen_img.main([*argv, "--control_net_multipliers", *strengths.split()]) == 0
        pictures.append(np.asarray(Image.open(tmp_path / "out" / "im_000001.png")).tobytes())
    assert len(set(pictures)) == 4
    monkeypatch.setattr("library.inference.run.load_for_drawing", None)
    with TensorReader(weights(places / "1")) as tensors:
        save(changed(dict(tensors), "cut"), tmp_path / "cut.safetensors")
    argv[argv.index(str(places / "1"))] = str(tmp_path / "cut.safetensors")
    assert sdxl_gen_img.main(argv) == 2
    assert "10 are missing" in capsys.readouterr().err
    assert sdxl_gen_img.main([*argv, "--control_net_models", "owner/hub-id"]) == 2
    assert "control_net_models owner/hub-id does not exist" in capsys.readouterr().err
