"""Files of pictures: formats, names, and what they say about what made them."""

import re
from dataclasses import replace

import pytest
from PIL import Image

from library.config.choices import SAMPLERS
from library.config.generate import GenerateOptions
from library.inference.highres import first_stage
from library.inference.parameters_text import (
    MadeBy,
    NetworkUse,
    made_by,
    parameters_text,
    read_parameters,
    sampler_name,
)
from library.inference.request import GenRequest, HighresFix
from library.inference.writer import PARAMETERS, Names, misfit, png_text, save_picture
from library.sizes import Size

RED = GenRequest(prompt="a red cat", size=Size(512, 768), steps=20, scale=7.0, seed=1, sampler="euler_a")


def test_the_text_is_what_a1111_writes():
    assert parameters_text(RED) == (
        "a red cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, RNG: CPU"
    )
    made = MadeBy("models/my v1.5, best.safetensors", "vaes/sdxl.vae.safetensors",
                  (NetworkUse("a/cat-v2.safetensors", "networks.lora", 0.8), NetworkUse("b.pt", "x", 1.0)))  # fmt: skip
    request = GenRequest("a (grün:1.2) cat", "blurry, bad", Size(1024, 1024), 28, 5.5, 7, "dpmpp_sde_karras", eta=0.5)
    assert parameters_text(request, made) == (
        "a (grün:1.2) cat <lora:cat-v2:0.8> <lora:b:1>\n"
        "Negative prompt: blurry, bad\n"
        "Steps: 28, Sampler: DPM++ SDE Karras, CFG scale: 5.5, Seed: 7, Size: 1024x1024, "
        'Model: "my v1.5, best", VAE: sdxl.vae.safetensors, Eta: 0.5, RNG: CPU'
    )
    assert "Eta DDIM: 0.5" in parameters_text(GenRequest(sampler="ddim", eta=0.5))


def test_drawing_over_a_picture_and_in_two_sizes_has_a1111s_form():
    over = replace(RED, image="a.png")
    assert ", Denoising strength: 0.8," in parameters_text(over)
    assert ", Denoising strength: 0.35," in parameters_text(replace(over, strength=0.35))
    two = replace(RED, highres=HighresFix(0.5, steps=8, save_first=True), strength=0.6)
    assert parameters_text(replace(two, stage="1")).split("\n")[1] == (
        "Steps: 8, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 256x384, Denoising strength: 0.6, "
        "Hires resize: 512x768, Hires steps: 20, RNG: CPU"
    )
    small = parameters_text(first_stage(two))
    assert "Steps: 8," in small and "Size: 256x384" in small and "Hires" not in small and "Denoising" not in small


def test_samplers_have_a1111s_names():
    names = {name: sampler_name(name) for name in SAMPLERS}
    assert names["dpmpp_2m_karras"] == "DPM++ 2M Karras" and names["dpmsolver++"] == names["dpmpp_2m"] == "DPM++ 2M"
    assert names["k_dpm_2_a"] == "DPM2 a" and names["lms_exponential"] == "LMS Exponential"
    assert {name for name in SAMPLERS if names[name] == name} == {"dpmsolver", "dpmsingle"}


def test_what_is_written_is_read_again_as_a1111_reads_it():
    made = MadeBy("a: b, c.ckpt")
    request = GenRequest(prompt="one, two: three", negative="four: 1, five: 2, six: 3", seed=5)
    prompt, negative, settings = read_parameters(parameters_text(request, made))
    assert (prompt, negative) == (request.prompt, request.negative)
    assert settings["Model"] == "a: b, c" and settings["Size"] == "1024x1024" and settings["CFG scale"] == "7.5"
    assert read_parameters("just a prompt: two") == ("just a prompt: two", "", {})
    assert read_parameters("a\nb\nNegative prompt: c\nd\nSteps: 1, Sampler: x, Seed: 2")[:2] == ("a\nb", "c\nd")
    assert read_parameters("") == ("", "", {})


def test_strengths_are_those_of_the_picture():
    options = GenerateOptions(
        network_module=["x"] * 3, network_weights=["a", "b", "c"], network_mul=[0.5], network_merge_n_models=1
    )

    def strengths(muls):
        return [use.strength for use in made_by(options, GenRequest(network_muls=muls)).networks]

    assert strengths(None) == [0.5, 1.0, 1.0]
    assert strengths((0.2,)) == [0.5, 0.2, 0.2]  # the last counts for the rest; merged ones stay
    assert strengths((0.2, 0.3)) == [0.5, 0.2, 0.3]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "a.JPEG"])
def test_every_format_carries_the_parameters(tmp_path, name):
    request = GenRequest(prompt="ein grüner 猫 🐈", negative="плохо", seed=1)
    text = png_text(request) | {PARAMETERS: parameters_text(request)}
    picture = Image.radial_gradient("L").convert("RGB")
    save_picture(picture, tmp_path / name, text)
    with Image.open(tmp_path / name) as read:
        assert read.format == {"png": "PNG", "ebp": "WEBP"}.get(name[-3:], "JPEG") and read.size == picture.size
        if read.format == "PNG":
            assert read.text == text
        else:
            comment = read.getexif().get_ifd(0x8769)[0x9286]
            assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == text[PARAMETERS]
            exif = read.info["exif"].removeprefix(b"Exif\0\0")
            assert exif[:2] == b"MM" and b"\x92\x86\0\x07" in exif  # piexif, with which A1111 reads, wants UNDEFINED
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_quality_acts_and_defaults_to_sd_scripts(tmp_path):
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    for ending, usual in ((".webp", 100), (".jpg", 95)):
        sizes = []
        for quality in (None, usual, 40):
            save_picture(picture, tmp_path / f"{quality}{ending}", {}, quality=quality)
            sizes.append((tmp_path / f"{quality}{ending}").stat().st_size)
        assert sizes[0] == sizes[1] > 1.5 * sizes[2]


def test_what_a_file_cannot_hold_is_said():
    assert "WEBP files have at most 16383 pixels" in misfit("a.webp", Size(64, 16384), "")
    assert "JPEG files have at most 65500 pixels" in misfit("a.jpg", Size(65501, 64), "")
    assert not misfit("a.png", Size(99999, 64), "") and not misfit("a.jpg", Size(64, 64), "x" * 32000)
    assert "letters of parameters" in misfit("a.jpg", Size(64, 64), "x" * 33000)


def test_the_limits_are_those_of_the_formats(tmp_path):
    long = "x" * next(n for n in range(33000, 0, -1) if not misfit("a.jpg", Size(8, 8), "x" * n))
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", {PARAMETERS: long})
    with pytest.raises(ValueError):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "b.jpg", {PARAMETERS: long + "x"})
    for name, side in (("c.webp", 16383), ("c.jpg", 65500)):
        save_picture(Image.new("RGB", (side, 1)), tmp_path / name, {})
        with pytest.raises((ValueError, OSError)):
            save_picture(Image.new("RGB", (side + 1, 1)), tmp_path / f"d{name}", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.jpg", "c.webp", "c.jpg"}


def names(sequential=False, ending=".png", originals=False):
    return Names(ending, sequential=sequential, stamp="20260101000000", originals=originals)


def test_names_tell_which_of_two_sizes_and_what_is_drawn_over():
    over = replace(RED, image="in/my v1.5 cat.jpg")
    given = names(sequential=True)
    small, whole = replace(RED, stage="0"), replace(RED, stage="1")
    assert [given.next(request, 4) for request in (small, whole, over)] == [
        "im_0000005.png", "im_1000005.png", "im_000005.png",
    ]  # fmt: skip
    given = names(sequential=True, originals=True)
    both = (replace(over, stage="0"), replace(over, stage="1"), over, replace(over, name="x"), RED)
    assert [given.next(request, 0) for request in both] == [
        "my v1.5 cat_0.png", "my v1.5 cat.png", "my v1.5 cat_001.png", "x.png", "im_000001.png",
    ]  # fmt: skip
    assert names().next(replace(RED, stage="1"), 3) == "im_20260101000000_1003_1.png"
    assert names().is_time(over) and not names(originals=True).is_time(over)


def test_pictures_of_one_second_and_seed_have_names_of_their_own():
    given = names()
    assert [given.next(RED, number) for number in range(2)] == [
        "im_20260101000000_000_1.png",
        "im_20260101000000_001_1.png",
    ]


def test_names_that_prompts_give_are_taken_as_they_are():
    given = names(sequential=True, ending=".webp")
    asked = ("a.png", "", "A.png", "a.png", "b", "a_001.png", "b.jpg", "im_000009", "", "v1.5")
    found = [given.next(GenRequest(name=name, seed=3), number) for number, name in enumerate(asked)]
    assert found == ["a.png", "im_000002.webp", "A_001.png", "a_002.png", "b.webp", "a_001_001.png", "b.jpg",
                     "im_000009.webp", "im_000009_001.webp", "v1.5.webp"]  # fmt: skip
    many = [given.next(GenRequest(name="c"), 0) for _ in range(1200)]
    assert len(set(many)) == 1200 and re.fullmatch(r"c_1199\.webp", many[-1])
