"""sdxl_gen_img.py from argv to files, and the plan of seeds."""

import random

import pytest
from PIL import Image

import sdxl_gen_img
from library.inference.prompt_line import GenRequest
from library.inference.run import plan
from library.inference.writer import PictureWriter, png_text, save_png
from library.io.safetensors_file import save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and NumPy 2


def seeds(prompts, **how):
    return [r.seed for r in plan(prompts, **({"images_per_prompt": 1, "n_iter": 1, "seed": None} | how))]


def test_one_picture_takes_the_seed_itself_and_several_sd_scripts_stream():
    assert seeds([GenRequest()], seed=7) == [7]
    stream = random.Random(7)
    wanted = [stream.randint(0, 2**31 - 1) for _ in range(8)]
    assert seeds([GenRequest(), GenRequest()], seed=7, images_per_prompt=2, n_iter=2) == wanted


def test_seeds_in_a_prompt_are_used_up_picture_by_picture_in_every_iteration():
    given = GenRequest(seeds=(1, 2))
    first = random.Random(7).randint(0, 2**31 - 1)
    planned = seeds([given], seed=7, images_per_prompt=3, n_iter=2)
    assert planned[:3] == [1, 2, first] and planned[3:5] == [1, 2]
    assert seeds([given, GenRequest()], seed=7) == [1, first]


def test_without_a_seed_pictures_differ():
    assert len(set(seeds([GenRequest()], images_per_prompt=20))) == 20


def test_a_run_draws_what_its_file_says_and_writes_it_down(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# comment\na red circle --d 5,6 --n blurry\na grün star --w 64 --h 96 --l 1\n", "utf-8")
    out = tmp_path / "deep" / "out"
    argv = f"--ckpt tiny --from_file {prompts} --outdir {out} --steps 2 --images_per_prompt 2 --batch_size 3 --seed 9"
    assert sdxl_gen_img.main([*argv.split(), "--sampler", "euler_a", "--sequential_file_name"]) == 0
    files = sorted(out.iterdir())
    assert [file.name for file in files] == [f"im_{n:06d}.png" for n in range(1, 5)]
    printed = capsys.readouterr().out
    assert str(out) in printed and all(file.name in printed for file in files)
    pictures = [Image.open(file) for file in files]
    assert [picture.size for picture in pictures] == [(128, 128)] * 2 + [(64, 96)] * 2
    first, third = pictures[0].text, pictures[2].text
    assert (first["prompt"], first["negative-prompt"], first["seed"]) == ("a red circle", "blurry", "5")
    assert first["raw-prompt"] == "a red circle --d 5,6 --n blurry"
    assert (first["sampler"], first["steps"], first["scale"], first["crop-top"]) == ("euler_a", "2", "7.5", "None")
    assert pictures[1].text["seed"] == "6"
    assert (third["prompt"], third["scale"], third["seed"]) == (
        "a grün star",
        "1.0",
        str(random.Random(9).randint(0, 2**31 - 1)),
    )


def test_sampler_and_guidance_are_written_down_and_what_a_sampler_cannot_do_is_known_before_drawing(tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    base = ["--ckpt", "tiny", "--outdir", str(out), "--W", "64", "--H", "64"]
    chosen = "--sampler dpmpp_sde_karras --eta 0.5 --negative_scale 3 --guidance_rescale 0.7 --steps 2 --seed 1"
    assert sdxl_gen_img.main([*base, *chosen.split(), "--prompt", "red --n blurry"]) == 0
    (file,) = out.iterdir()
    text = Image.open(file).text
    assert [text[key] for key in ("sampler", "eta", "negative-scale", "guidance-rescale")] == [
        "dpmpp_sde_karras",
        "0.5",
        "3.0",
        "0.7",
    ]
    assert not {"eta", "negative-scale", "guidance-rescale"} & png_text(GenRequest()).keys()
    prompts.write_text("red --s 4\nblue --s 3\n", "utf-8")
    assert sdxl_gen_img.main([*base, "--from_file", str(prompts), "--sampler", "pndm"]) == 2
    assert "pndm cannot do 3 steps" in capsys.readouterr().err
    assert list(out.iterdir()) == [file]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_draws(tmp_path, precision):
    argv = f"--ckpt tiny --prompt red --outdir {tmp_path} --steps 2 --{precision} --no_half_vae --W 64 --H 64"
    assert sdxl_gen_img.main(argv.split()) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("im_2") and Image.open(file).size == (64, 64)


def test_strengths_without_networks_and_broken_network_files_are_explained(tmp_path, capsys):
    base = ["--ckpt", "tiny", "--outdir", str(tmp_path / "out"), "--steps", "1"]
    assert sdxl_gen_img.main([*base, "--prompt", "a --am 0.5"]) == 2
    assert "--am" in capsys.readouterr().err
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a network")
    network = ["--network_module", "networks.lora", "--network_weights", str(bad)]
    assert sdxl_gen_img.main([*base, "--prompt", "a", *network]) == 2
    assert str(bad) in capsys.readouterr().err
    foreign = tmp_path / "sd1.safetensors"
    import torch

    save({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 4)}, foreign)
    network[-1] = str(foreign)
    assert sdxl_gen_img.main([*base, "--prompt", "a", *network]) == 2
    assert "Stable Diffusion 1.x or 2.x" in capsys.readouterr().err
    assert sdxl_gen_img.main([*base, "--prompt", "a", *network, "--network_args", "conv_dim=4"]) == 2
    assert "network_args" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pictures_of_one_second_and_seed_do_not_overwrite_each_other(tmp_path):
    writer = PictureWriter(tmp_path)
    request = GenRequest(prompt="x", seed=3)
    paths = [writer.write(request, Image.new("RGB", (8, 8))) for _ in range(3)]
    assert len(set(paths)) == len(list(tmp_path.iterdir())) == 3


def test_text_of_any_language_survives_in_the_file(tmp_path):
    request = GenRequest(prompt="ein grüner 猫 (sehr:1.2)", negative="плохо", raw="ein grüner 猫 --n плохо", seed=1)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", png_text(request))
    assert Image.open(tmp_path / "a.png").text == png_text(request)
