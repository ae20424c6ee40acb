"""Prompt lines and prompt files (gen_img.md §3 and §16)."""

import logging
from dataclasses import replace

import pytest

from library.errors import UserError
from library.inference.prompt_line import GenRequest, parse_line, parse_sample_line, read_lines, read_prompt_file
from library.sizes import Size

DEFAULTS = GenRequest(size=Size(1024, 768), steps=20, scale=7.0, sampler="euler")


def parsed(line: str) -> dict[str, object]:
    """What a line changes of the defaults."""
    request = parse_line(line, DEFAULTS)
    changed = {
        name: getattr(request, name) for name in vars(DEFAULTS) if getattr(request, name) != vars(DEFAULTS)[name]
    }
    changed.pop("raw", None)
    return changed


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("a cat", {"prompt": "a cat"}),
        ("  a cat  --w 512 --h 640", {"prompt": "a cat", "size": Size(512, 640)}),
        ("a cat --h 640", {"prompt": "a cat", "size": Size(1024, 640)}),
        ("a cat --n bad, worse (ugly:1.2)", {"prompt": "a cat", "negative": "bad, worse (ugly:1.2)"}),
        ("a cat --S 30 --L 4.5", {"prompt": "a cat", "steps": 30, "scale": 4.5}),
        ("a cat --s 30 and more text --l 1", {"prompt": "a cat", "steps": 30, "scale": 1.0}),
        ("a cat --s 5000", {"prompt": "a cat", "steps": 1000}),
        ("a cat --s 0", {"prompt": "a cat", "steps": 1}),
        ("a cat --d 5", {"prompt": "a cat", "seed": 5, "seeds": (5,)}),
        ("a cat --d 5,6,7", {"prompt": "a cat", "seed": 5, "seeds": (5, 6, 7)}),
        ("a cat --am 0.5,-1", {"prompt": "a cat", "network_muls": (0.5, -1.0)}),
        ("a --ow 10 --oh 20 --nw 30", {"prompt": "a", "original_width": 10, "original_height": 20,
                                        "original_width_negative": 30}),
        ("a --nh 40 --ct 5 --cl 6", {"prompt": "a", "original_height_negative": 40, "crop_top": 5, "crop_left": 6}),
        ("--w 512", {"size": Size(512, 768)}),
        ("well-known --- dashes", {"prompt": "well-known"}),
        ("semi--detached", {"prompt": "semi--detached"}),
        ("w 512 wide", {"prompt": "w 512 wide"}),
    ],
)  # fmt: skip
def test_options_of_a_line(line, wanted):
    assert parsed(line) == wanted


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a --t 0.5", "--t in a prompt is not supported yet"),
        ("a --glt 400", "--glt in a prompt is not supported yet"),
        ("a --nl 3", "--nl in a prompt is not supported yet"),
        ("a --am2 3", "--am2 in a prompt is not known (did you mean --am?)"),
        ("a --q 3", "--q in a prompt is not known"),
        ("a --w wide", "the value is not readable"),
        ("a --w", "the value is not readable"),
        ("a --am ,.", "left out"),
        ("a --ow 0", "must be 1 or more"),
        ("{red|blue} cat", "choices in prompts are not supported yet"),
        ("a cat AND a dog", "AND between sub-prompts is not supported yet"),
    ],
)
def test_what_has_no_effect_is_named_and_changes_nothing(line, words, caplog):
    with caplog.at_level(logging.WARNING):
        changed = parsed(line)
    assert set(changed) == {"prompt"}
    assert words in caplog.text


def test_sizes_are_rounded_down_to_latent_cells_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert parse_line("a --w 517 --h 3", DEFAULTS).size == Size(512, 64)
    assert "517x768" in caplog.text and "512x64" in caplog.text


def test_size_ids_fall_back_from_negative_to_original_to_output():
    request = GenRequest(size=Size(640, 512))
    assert request.size_ids() == request.size_ids(negative=True) == (512, 640, 0, 0, 512, 640)
    request = replace(request, original_width=100, original_height=200, crop_top=3, crop_left=4)
    assert request.size_ids() == request.size_ids(negative=True) == (200, 100, 3, 4, 512, 640)
    request = replace(request, original_height_negative=50)
    assert request.size_ids() == (200, 100, 3, 4, 512, 640)
    assert request.size_ids(negative=True) == (50, 100, 3, 4, 512, 640)


def test_sample_lines_have_their_own_options(caplog):
    assert parse_sample_line("a --ss heun --l 3", DEFAULTS).sampler == "heun"
    with caplog.at_level(logging.WARNING):
        assert parse_sample_line("a --ss nonsense --am 1 --cn x.png", DEFAULTS) == replace(
            DEFAULTS, prompt="a", control=("x.png",), raw="a --ss nonsense --am 1 --cn x.png"
        )
    with caplog.at_level(logging.WARNING):
        assert parse_sample_line("a --g 3 --fs 2", DEFAULTS).scale == DEFAULTS.scale
    assert "--g in a prompt is for other models" in caplog.text and "--fs in a prompt is for other" in caplog.text
    assert "--am in a prompt is not known" in caplog.text


@pytest.fixture
def write(tmp_path):
    def make(name: str, text: str | bytes):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def test_text_files_skip_blank_lines_and_comments(write):
    path = write("p.txt", "\ufeffone\n\n  # no\r\n two --s 3\n")
    assert read_lines(path) == ["one", "two --s 3"]
    first, second = read_prompt_file(path, size=Size(512, 768))
    assert (first.prompt, first.size, first.steps, first.scale) == ("one", Size(512, 768), 30, 7.5)
    assert (first.sampler, first.seed) == ("euler_a", None)
    assert second.steps == 3


def test_toml_files_share_keys_and_subsets_win(write):
    path = write(
        "p.toml",
        '[prompt]\nwidth = 256\nheight = 320\nseed = 1\n[[prompt.subset]]\nprompt = "a"\nscale = 3\n'
        '[[prompt.subset]]\nprompt = "b"\nseed = 2\nnegative_prompt = "c"\nsample_steps = 5\nsample_sampler = "heun"\n',
    )
    a, b = read_prompt_file(path)
    assert (a.prompt, a.size, a.seed, a.scale, a.negative) == ("a", Size(256, 320), 1, 3.0, "")
    assert (b.prompt, b.seed, b.negative, b.steps, b.sampler) == ("b", 2, "c", 5, "heun")


def test_keys_for_other_models_are_left_out_and_said(write, caplog):
    (request,) = read_prompt_file(write("p.json", '[{"prompt": "a", "guidance_scale": 3.5, "scale": 2}]'))
    assert request.scale == 2.0 and '"guidance_scale" is for other models' in caplog.text


def test_json_files_hold_objects_or_lines(write):
    a, b = read_prompt_file(write("p.json", '[{"prompt": "a", "width": 128}, "b --w 256"]'))
    assert (a.prompt, a.size.w, b.prompt, b.size.w) == ("a", 128, "b", 256)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "# nothing\n", "no prompts"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.yaml", "a", "not a kind of prompt file"),
        ("p.toml", "[prompt]\nprompt = 'a'\nwidht = 3", '"widht" is not known'),
        ("p.toml", "[prompt]\nprompt = 'a'\nwidth = 'x'", "wrong type"),
        ("p.toml", "[prompt]\nprompt = 'a'\nsample_sampler = 'x'", "must be one of"),
        ("p.toml", "[prompt]\nprompt = 'a'\ncontrolnet_image = 1", "wrong type"),
        ("p.toml", "[prompt]\nwidth = 3", '"prompt" is missing'),
        ("p.toml", "[prompt", "not valid TOML"),
        ("p.toml", "prompt = 3", "one table [prompt]"),
        ("p.json", "{", "not valid JSON"),
        ("p.json", "{}", "a list"),
        ("p.json", "[]", "no prompts"),
        ("p.json", '[{"prompt": "a", "seed": true}]', "wrong type"),
        ("p.json", '[{"prompt": "a", "seed": -1}]', "0 or more"),
    ],
)
def test_bad_prompt_files_are_explained(write, name, text, words):
    path = write(name, text)
    with pytest.raises(UserError) as error:
        read_prompt_file(path)
    assert words in error.value.problems[0].what
    assert str(path) in error.value.problems[0].where


def test_a_missing_prompt_file_is_explained(tmp_path):
    with pytest.raises(UserError) as error:
        read_prompt_file(tmp_path / "p.txt")
    assert "does not exist" in error.value.problems[0].what
