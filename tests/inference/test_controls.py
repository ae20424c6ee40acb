"""Control images in generation: who takes which, when a network acts, and that nothing stays behind."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sdxl_gen_img
from library.config.cli import make_config
from library.config.generate import GenerateOptions
from library.errors import UserError
from library.inference.adapters import adapter_roots
from library.inference.controls import check_samples, guide_images, load_controls, with_guides
from library.inference.effects import DeepShrink, GradualLatent
from library.inference.launch import generate
from library.inference.prompt_line import parse_sample_line
from library.inference.regional import Regional
from library.inference.request import GenRequest
from library.inference.sample_prompts import read_prompt_file
from library.io.safetensors_file import save
from library.sizes import Size
from networks import control_net_lllite

REQUEST = GenRequest(prompt="a red circle", size=Size(64, 64), steps=2, scale=3.0, seed=3, sampler="ddim")


@pytest.fixture(scope="module")
def places(bundle, tmp_path_factory):
    """Two networks of the tiny model that change pictures visibly, and control images of another size."""
    folder = tmp_path_factory.mktemp("controls")
    (root,) = (root for root in adapter_roots(bundle) if root.part == "unet")
    for number in (1, 2):
        torch.manual_seed(number)
        network = control_net_lllite.create(root, cond_emb_dim=8, mlp_dim=8)
        for part in network.parts.values():
            torch.nn.init.normal_(part.up[0].weight, std=1.0)
            with torch.no_grad():
                part.conditioning1[-1].weight.mul_(20)
        save(network.export(), folder / f"{number}.safetensors")
    rng = np.random.default_rng(0)
    (folder / "guides").mkdir()
    for name in "abcd":
        Image.fromarray(rng.integers(0, 255, (96, 80, 3), np.uint8)).save(folder / "guides" / f"{name}.png")
    return folder


@pytest.fixture
def loaded(bundle, places):
    """loaded("12", **options): a context with the networks on the model."""

    @contextmanager
    def load(names: str, **options):
        files = [str(places / f"{name}.safetensors") for name in names]
        controls = load_controls(bundle, GenerateOptions(control_net_lllite_models=files, **options))
        yield controls
        for control in controls.controls:
            control.network.detach()

    return load


def guided(places: Path, *names: str) -> GenRequest:
    return GenRequest(**{**vars(REQUEST), "control": tuple(str(places / "guides" / f"{name}.png") for name in names)})


def named(places: Path, *guides: str, lllites: int, nets: int = 0):
    """A configuration that names so many networks and these control images."""
    paths = [str(places / guide) for guide in guides]
    file = str(places / "1.safetensors")
    models = {"control_net_lllite_models": [file] * lllites, "control_net_models": [file] * nets}
    return make_config("sdxl_gen_img", ckpt="tiny", prompt="a", guide_image_path=paths, **models)


def drawn(bundle, requests, controls=None, **how):
    return [
        np.asarray(picture).astype(np.int16)
        for _, picture in generate(bundle, requests, followers=[controls] if controls else [], **how)
    ]


def test_pictures_follow_their_own_image_whatever_they_are_drawn_with(bundle, places, loaded):
    (base,) = drawn(bundle, [REQUEST])
    requests = [guided(places, "a"), guided(places, "b"), REQUEST]
    with loaded("1") as controls:
        a, b, plain = drawn(bundle, requests, controls)
        assert np.array_equal(plain, base), "without an image nothing acts"
        assert np.abs(a - base).mean() > 2 and np.abs(a - b).mean() > 1
        for got, wanted in zip(drawn(bundle, requests, controls, batch_size=3), (a, b, plain), strict=True):
            assert np.abs(got - wanted).max() <= 1, "the sums of a larger batch round otherwise"
        drawn(bundle, requests[:1], controls)
        assert all(part.condition_BNE is None for part in controls.controls[0].network.parts.values())


def test_each_image_is_embedded_once_at_the_size_of_the_picture(bundle, places, loaded, monkeypatch):
    with loaded("1") as controls:
        network, seen = controls.controls[0].network, []
        real = network.set_condition
        monkeypatch.setattr(network, "set_condition", lambda image: (seen.append(image), real(image))[1])
        drawn(bundle, [guided(places, "a")], controls)
    images = [image for image in seen if image is not None]
    wanted = Image.open(places / "guides" / "a.png").resize((64, 64), Image.Resampling.LANCZOS)
    assert len(images) == 1 and images[0].shape == (1, 3, 64, 64)
    expected = torch.from_numpy(np.array(wanted)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(images[0][0], expected.float())


def test_a_network_acts_in_its_share_of_the_steps_and_at_its_strength(bundle, places, loaded):
    request = GenRequest(**{**vars(guided(places, "a")), "steps": 4, "scale": 1.0})
    pictures = {}
    for ratio, acts in ((1.0, 4), (0.5, 3), (0.25, 2)):  # off before call i of 4 when ratio < i / 4
        with loaded("1", control_net_ratios=[ratio]) as controls:
            calls = []
            part = next(iter(controls.controls[0].network.parts.values()))
            part.down.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            (pictures[ratio],) = drawn(bundle, [request], controls)
            assert len(calls) == acts
    assert len({picture.tobytes() for picture in pictures.values()}) == 3
    with loaded("1", control_net_multipliers=[0.0]) as controls:
        off = drawn(bundle, [request], controls)[0]
    assert np.array_equal(off, drawn(bundle, [request])[0])


def test_latents_that_grow_and_maps_that_shrink(bundle, places, loaded):
    request = replace(guided(places, "a"), size=Size(128, 128), steps=4, sampler="euler_a")
    request = replace(request, gradual_latent=GradualLatent(999, 0.5, 0.5))
    with loaded("1") as controls:
        (a,) = drawn(bundle, [request], controls)
        (b,) = drawn(bundle, [replace(request, control=guided(places, "b").control)], controls)
        assert np.abs(a - b).mean() > 1
        with pytest.raises(UserError, match="a LLLite does not fit the maps"):
            drawn(bundle, [replace(guided(places, "a"), deep_shrink=DeepShrink(3))], controls)


def test_two_networks_take_an_image_each_in_the_order_of_the_files(bundle, places, loaded):
    guides = guide_images(named(places, "guides", lllites=2))
    assert guides == guide_images(named(places, "guides", lllites=1, nets=1))
    assert [[Path(path).stem for path in group] for group in guides] == [["a", "b"], ["c", "d"]]
    planned = with_guides([REQUEST] * 3, guides)
    assert [request.control for request in planned] == [guides[0], guides[1], guides[0]]
    assert with_guides([REQUEST], []) == [REQUEST]
    assert with_guides([REQUEST] * 2, guides, start=1) == planned[1:]  # a later prompt of the same run goes on
    with loaded("12") as both:
        ab, ac = (drawn(bundle, [guided(places, *names)], both)[0] for names in ("ab", "ac"))
    with loaded("12", control_net_multipliers=[1.0, 0.0]) as first:
        one = drawn(bundle, [guided(places, "a", "b")], first)[0]
    with loaded("1") as alone:
        assert np.array_equal(one, drawn(bundle, [guided(places, "a")], alone)[0])
    assert np.abs(ab - ac).mean() > 0.5 and np.abs(ab - one).mean() > 1


@pytest.mark.parametrize(
    ("models", "guides", "what"),
    [
        (2, ["guides/a.png"], "1 control images cannot be shared out among 2 networks"),
        (1, ["empty"], "the folder holds no image"),
        (1, ["1.safetensors"], "1.safetensors"),
    ],
)
def test_control_images_that_cannot_be_are_told(places, models, guides, what):
    (places / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        guide_images(named(places, *guides, lllites=models))
    assert what in str(caught.value)


def test_the_script_draws_with_a_network_and_refuses_wrong_files_before_loading(places, tmp_path, monkeypatch, capsys):
    argv = f"--ckpt tiny --outdir {tmp_path / 'out'} --steps 1 --W 64 --H 64 --scale 1 --seed 1 --prompt red"
    guides = ["--guide_image_path", str(places / "guides" / "a.png")]
    network = ["--control_net_lllite_models", str(places / "1.safetensors")]
    assert sdxl_gen_img.main([*argv.split(), *network, *guides, "--control_net_multipliers", "0.5"]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    save({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    monkeypatch.setattr("library.inference.run.load_for_drawing", None)
    assert sdxl_gen_img.main([*argv.split(), *network, *guides, "--prompt", "red --dsd1 3"]) == 2
    assert "does not fit the maps that Deep Shrink makes\n  where: red --dsd1 3" in capsys.readouterr().err
    network[1] = str(tmp_path / "lora.safetensors")
    assert sdxl_gen_img.main([*argv.split(), *network, *guides]) == 2
    told = capsys.readouterr().err
    assert "it is a LoRA" in told and "give it as network_weights" in told
    name = "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    other = {f"{name}.conditioning1.0.weight": torch.ones(4, 3, 4, 4), f"{name}.down.0.weight": torch.ones(6, 1280)}
    save(other, tmp_path / "lora.safetensors")
    assert sdxl_gen_img.main([*argv.split(), *network, *guides]) == 2
    assert f"{name} is made for a layer of 1280 numbers, this model's has 80" in capsys.readouterr().err
    guides[1] = str(tmp_path / "nowhere.png")
    assert sdxl_gen_img.main([*argv.split(), *network, *guides]) == 2
    assert "nowhere.png does not exist" in capsys.readouterr().err


def test_sample_prompts_name_their_image_in_every_form_of_file(places, tmp_path):
    image = str(places / "guides" / "a.png")
    assert parse_sample_line(f"a cat --cn {image} --s 2", REQUEST).control == (image,)
    (tmp_path / "p.toml").write_text(f"[prompt]\nprompt = 'a cat'\ncontrolnet_image = {image!r}\n")
    requests = read_prompt_file(tmp_path / "p.toml")
    check_samples(requests, where="p.toml")
    assert requests[0].control == (image,)
    for request, what in ((REQUEST, "has no control image"), (guided(places, "zz"), "does not exist")):
        with pytest.raises(UserError, match=what):
            check_samples([request], where="p.txt")


def test_control_images_reach_every_sub_prompt_of_their_picture(bundle, places, loaded):
    white = torch.full((8, 8, 3), 255, dtype=torch.uint8)
    plain = [guided(places, "a"), guided(places, "b")]
    parted = [GenRequest(**{**vars(request), "prompt": "a red circle AND a red circle"}) for request in plain]
    with loaded("1") as controls:
        expected = [p for _, p in generate(bundle, plain, batch_size=2, followers=[controls])]
        followers = [controls, Regional(bundle.unet, [], white)]
        found = [p for _, p in generate(bundle, parted, batch_size=2, followers=followers)]
    a, b, c, d = (np.asarray(picture).astype(int) for picture in (*expected, *found))
    assert np.abs(a - c).max() <= 1 and np.abs(b - d).max() <= 1 and np.abs(a - b).mean() > 1
