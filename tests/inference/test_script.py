"""sdxl_gen_img.py from argv to files."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdxl_gen_img
from library.inference import run
from library.inference.request import GenRequest
from library.inference.writer import png_text, save_png
from library.io.safetensors_file import save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and NumPy 2


def test_a_run_draws_what_its_file_says_and_writes_it_down(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# comment\na red circle --d 5,6 --n blurry\na grün star --w 64 --h 96 --l 1\n", "utf-8")
    out = tmp_path / "deep" / "out"
    argv = f"--ckpt tiny --from_file {prompts} --outdir {out} --steps 2 --images_per_prompt 2 --batch_size 3 --seed 9"
    assert sdxl_gen_img.main([*argv.split(), "--sampler", "euler_a", "--sequential_file_name"]) == 0
    files = sorted(out.glob("*.png"))
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
    (file,) = out.glob("*.png")
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
    assert list(out.glob("*.png")) == [file]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_draws(tmp_path, precision):
    argv = f"--ckpt tiny --prompt red --outdir {tmp_path} --steps 2 --{precision} --no_half_vae --W 64 --H 64"
    assert sdxl_gen_img.main(argv.split()) == 0
    (file,) = tmp_path.glob("*.png")
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


def test_text_of_any_language_survives_in_the_file(tmp_path):
    request = GenRequest(prompt="ein grüner 猫 (sehr:1.2)", negative="плохо", raw="ein grüner 猫 --n плохо", seed=1)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", png_text(request))
    assert Image.open(tmp_path / "a.png").text == png_text(request)


def test_what_is_only_written_down_is_written_down():
    text = png_text(GenRequest(clip_prompt="a dog", negative_scale=1.5))
    assert (text["clip-prompt"], text["negative-scale"]) == ("a dog", "1.5")
    assert not {"clip-prompt", "negative-scale"} & png_text(GenRequest()).keys()


def test_of_many_pictures_the_first_names_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "run", lambda cfg: [tmp_path / f"{number}.png" for number in range(1, 24)])
    assert sdxl_gen_img.main(["--ckpt", "tiny", "--prompt", "a"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"23 pictures in {tmp_path.resolve()}:"
    assert [line.strip() for line in printed[1:]] == [*(f"{number}.png" for number in range(1, 21)), "and 3 more"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_nothing_leaks_from_one_prompt_into_the_next(tmp_path, batch_size, lora_file):
    first = "a {red|blue} circle --n dark --d 1,2"
    others = [
        "a (green:1.4) star BREAK {x|y} --w 64 --h 96 --ow 32 --oh 40 --nw 20 --nh 24 --ct 5 --cl 6 --s 2 --d 4 --l 3 "
        "--nl 1.5 --n {blurry|bad} --am 0 --c words --f other",
        "a red star --d 3,3 --nl 0 --am 2",
        "long " * 100 + "--d 8 --l 1",
    ]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(line for other in others for line in (first, other)) + "\n" + first)
    argv = f"--ckpt tiny --from_file {prompts} --outdir {tmp_path / 'out'} --steps 3 --sampler euler_a --seed 1"
    more = f"--images_per_prompt 2 --max_embeddings_multiples 2 --batch_size {batch_size} --sequential_file_name"
    network = ["--network_module", "networks.lora", "--network_weights", str(lora_file), "--network_mul", "0.7"]
    assert sdxl_gen_img.main([*argv.split(), *more.split(), *network]) == 0
    pictures = [Image.open(path) for path in sorted((tmp_path / "out").glob("im_*"))]
    drawn = {seed: [p for p in pictures if p.text["seed"] == seed and "circle" in p.text["prompt"]] for seed in "12"}
    for same in drawn.values():
        assert len(same) == 4 and len({(picture.tobytes(), str(sorted(picture.text.items()))) for picture in same}) == 1
    assert drawn["1"][0].tobytes() != drawn["2"][0].tobytes()
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"other.png", "other_001.png"} <= names and len(names) == 14


def test_prompts_are_asked_for_while_the_model_stays_loaded(tmp_path, capsys, monkeypatch):
    typed = iter(["", "a --q 1", "{a", "a red circle --d 5", "a --am 2", "a --t 1", "  ", "a {red|green} star --l 1"])
    asked = []

    def read(ask):
        asked.append(ask)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("library.inference.interactive.ask_and_draw.__kwdefaults__", {"read": read})
    loads = []
    original = run.load_for_drawing
    monkeypatch.setattr(run, "load_for_drawing", lambda *a, **k: loads.append(a) or original(*a, **k))
    argv = f"--ckpt tiny --interactive --prompt first --outdir {tmp_path / 'out'} --steps 1 --seed 9"
    assert sdxl_gen_img.main([*argv.split(), "--sequential_file_name"]) == 0
    texts = [Image.open(path).text for path in sorted((tmp_path / "out").glob("*.png"))]
    assert [(text["prompt"], text["seed"]) for text in texts[:2]] == [("first", "9"), ("a red circle", "5")]
    assert texts[2]["prompt"] in ("a red star", "a green star") and texts[2]["seed"] == "9" and len(texts) == 3
    printed = capsys.readouterr()
    assert len(asked) == 9 and len(loads) == 1 and "im_000003.png" in printed.out
    assert "--q in a prompt is not known" in printed.err and "input line 3" in printed.err and "--am" in printed.err
    assert "--t cannot act: nothing is drawn over" in printed.err


def test_options_of_the_command_line_reach_the_plan(tmp_path):
    prompts, cards = tmp_path / "prompts.txt", tmp_path / "cards"
    cards.mkdir()
    (cards / "colour.txt").write_text("red\n")
    prompts.write_text("".join(f"{number} __colour__ --l {number % 2 + 1}\n" for number in range(5)))
    argv = (
        f"--ckpt tiny --from_file {prompts} --wildcard_dir {cards} --outdir {tmp_path / 'out'} --W 64 --H 64 --seed 4"
    )
    more = "--steps 1 --n_iter 2 --shuffle_prompts --iter_same_seed --negative_scale 0.5 --sequential_file_name"
    assert sdxl_gen_img.main([*argv.split(), *more.split()]) == 0
    texts = [Image.open(path).text for path in sorted((tmp_path / "out").glob("*.png"))]
    first, second = ([text["prompt"] for text in half] for half in (texts[:5], texts[5:]))
    assert sorted(first) == sorted(second) == [f"{number} red" for number in range(5)] and first != second
    assert [len({text["seed"] for text in half}) for half in (texts[:5], texts[5:], texts)] == [1, 1, 2]
    assert {text["negative-scale"] for text in texts} == {"0.5"}


def test_no_prompt_at_all_draws_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert sdxl_gen_img.main(["--ckpt", "tiny", "--interactive", "--outdir", str(tmp_path / "out")]) == 0
    assert "no pictures" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_mistakes_in_prompts_are_found_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "load_for_drawing", lambda *a, **k: pytest.fail("loaded"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# fine\na cat\n\na __colour__ cat --w x\nb --glt 3\n")
    (tmp_path / "cards").mkdir()
    argv = f"--ckpt tiny --from_file {prompts} --wildcard_dir {tmp_path / 'cards'}"
    assert sdxl_gen_img.main(argv.split()) == 2
    printed = capsys.readouterr().err
    assert "2 problems" in printed and f"{prompts} line 4" in printed and f"{prompts} line 5" in printed
    assert "\n    b --glt 3\n      ^^^^^\n" in printed and "there is no wildcard file" in printed
    assert sdxl_gen_img.main(["--ckpt", "tiny", "--prompt", "a", "--outdir", str(prompts)]) == 2
    assert f"outdir {prompts} is a file" in capsys.readouterr().err
    assert sdxl_gen_img.main(["--ckpt", "tiny", "--prompt", "a --am 1"]) == 2
    assert "--am has nothing to act on: no networks are loaded" in capsys.readouterr().err
    assert sdxl_gen_img.main(["--ckpt", "tiny", "--prompt", "a", "--sampler", "pndm", "--steps", "2"]) == 2
    assert "pndm cannot do 2 steps" in capsys.readouterr().err


def test_pictures_are_drawn_over_and_in_two_sizes(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (100, 70), (200, 30, 30)).save(tmp_path / "in" / "red.png")
    Image.new("RGB", (64, 96), (30, 30, 200)).save(tmp_path / "in" / "blue.png")
    base = [
        "--ckpt",
        "tiny",
        "--steps",
        "4",
        "--seed",
        "1",
        "--outdir",
        str(tmp_path / "out"),
        "--sequential_file_name",
    ]
    over = ["--image_path", str(tmp_path / "in")]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle --t 0.25\na star\na cross --w 128 --h 128\n")
    assert sdxl_gen_img.main([*base, *over, "--strength", "0.5", "--from_file", str(prompts)]) == 0
    sizes = [Image.open(tmp_path / "out" / f"im_00000{number}.png").size for number in (1, 2, 3)]
    assert sizes == [(64, 96), (96, 64), (128, 128)], "blue.png comes first, by name"
    first = np.asarray(Image.open(tmp_path / "out" / "im_000001.png")).astype(int)
    assert np.abs(first - [30, 30, 200]).mean() < np.abs(first - [200, 30, 30]).mean() / 2
    assert sdxl_gen_img.main([*base, "--prompt", "a --t 0.5"]) == 2
    assert "--t cannot act: nothing is drawn over" in capsys.readouterr().err
    assert sdxl_gen_img.main([*base, *over, "--prompt", "a --t 0.1"]) == 2
    assert "strength 0.1 of 4 steps is less than one step" in capsys.readouterr().err
    two = [
        "--highres_fix_scale",
        "0.5",
        "--highres_fix_steps",
        "2",
        "--highres_fix_save_1st",
        "--W",
        "128",
        "--H",
        "192",
    ]
    assert sdxl_gen_img.main([*base, *two, "--prompt", "a star"]) == 0
    stages = [Image.open(tmp_path / "out" / f"im_{stage}000001.png").size for stage in (0, 1)]
    assert stages == [(64, 96), (128, 192)]


def test_pictures_are_drawn_over_by_the_prompts_that_they_hold(tmp_path, capsys):
    out, first = tmp_path / "out", tmp_path / "first"
    base = ["--ckpt", "tiny", "--W", "64", "--H", "64", "--sequential_file_name", "--seed", "1"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red {circle} --f b.webp --n dark\na star --f a\n")
    assert sdxl_gen_img.main([*base, "--from_file", str(prompts), "--steps", "1", "--outdir", str(first)]) == 0
    again = [*base, "--image_path", str(first), "--steps", "4", "--strength", "0.25", "--outdir", str(out)]
    assert sdxl_gen_img.main([*again, "--images_per_prompt", "2", "--use_original_file_name"]) == 0
    texts = {path.stem: Image.open(path).text for path in sorted(out.glob("*.png"))}
    assert list(texts) == ["a", "a_001", "b", "b_001"]
    assert [(text["prompt"], text["negative-prompt"]) for text in texts.values()] == [("a star", "")] * 2 + [
        ("a red circle", "dark")
    ] * 2
    assert len({text["seed"] for text in texts.values()}) == 4 and texts["a"]["steps"] == "4"
    assert sdxl_gen_img.main([*again, "--outdir", str(first), "--use_original_file_name"]) == 2
    assert "would take the place of one that is drawn over" in capsys.readouterr().err
    assert not (first / "b.png").exists(), "and nothing is drawn"
    lines = [json.loads(line) for line in (out / "parameters.jsonl").read_text().splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["a.png"] * 2 + ["b.webp"] * 2
    Image.new("RGB", (64, 64)).save(first / "plain.png")
    assert sdxl_gen_img.main(again) == 2
    assert "the picture's text holds no prompt" in capsys.readouterr().err


def test_what_the_model_is_told_may_stand_beside_the_prompt_or_in_it(tmp_path):
    base = ["--ckpt", "tiny", "--steps", "2", "--seed", "1", "--W", "64", "--H", "64", "--sequential_file_name"]
    inside = " --ow 200 --oh 180 --nw 40 --nh 30 --ct 8 --cl 16"
    beside = "--original_width 200 --original_height 180 --original_width_negative 40 --original_height_negative 30 "
    beside += "--crop_top 8 --crop_left 16"
    words = "a (red:1.9) circle"
    runs = [[words], [words + inside], [words, *beside.split()], [words, "--emb_normalize_mode", "none"],
            [words + inside, "--crop_top", "99", "--original_width", "1"]]  # fmt: skip
    pictures, texts = [], []
    for number, (prompt, *options) in enumerate(runs):
        out = tmp_path / str(number)
        assert sdxl_gen_img.main([*base, "--outdir", str(out), "--prompt", prompt, *options]) == 0
        picture = Image.open(out / "im_000001.png")
        pictures.append(np.asarray(picture).astype(int))
        texts.append({name: picture.text[name] for name in ("original-width", "crop-left")})
    plain, one, other, free, overruled = pictures
    assert np.array_equal(one, other) and texts[1] == texts[2] == {"original-width": "200", "crop-left": "16"}
    assert np.array_equal(one, overruled), "the prompt comes first"
    assert np.abs(one - plain).mean() > 0.1 and np.abs(free - plain).mean() > 0.1
