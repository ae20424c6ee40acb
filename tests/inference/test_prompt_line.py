"""Prompt lines and sample prompt files (gen_img.md §3 and §16)."""

import logging
import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from library.config.unsharp import Unsharp
from library.errors import UserError
from library.inference.effects import DeepShrink, GradualLatent
from library.inference.prompt_line import parse_line, parse_sample_line, seeds_of
from library.inference.prompt_source import PromptLine, caret, file_lines, prompt_lines
from library.inference.request import OPEN, GenRequest, split_and, with_open_sides
from library.inference.sample_prompts import read_prompt_file
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
        ("a cat --d 5, 6", {"prompt": "a cat", "seed": 5, "seeds": (5, 6)}),
        ("a cat --l 5. --s +3", {"prompt": "a cat", "scale": 5.0, "steps": 3}),
        ("a cat --t 0.35", {"prompt": "a cat", "strength": 0.35}),
        ("a cat --nl 1.5", {"prompt": "a cat", "negative_scale": 1.5}),
        ("a cat --nl 1.5 --NL None", {"prompt": "a cat"}),
        ("a cat --c a dog", {"prompt": "a cat", "clip_prompt": "a dog"}),
        ("a cat --f My cat", {"prompt": "a cat", "name": "My cat"}),
        ("a cat --f v1.5.PNG", {"prompt": "a cat", "name": "v1.5.PNG"}),
        ("a cat --dsd1 0", {"prompt": "a cat", "deep_shrink": DeepShrink(0)}),
        ("a cat --dsr .6", {"prompt": "a cat", "deep_shrink": DeepShrink(3, ratio=0.6)}),
        ("a --dst2 300 --dsd2 4 --dst1 700 --dsd1 2", {"prompt": "a", "deep_shrink": DeepShrink(2, 700, 4, 300)}),
        ("a cat --f x.webp", {"prompt": "a cat", "name": "x.webp"}),
        ("a cat --w 512, --h 640", {"prompt": "a cat", "size": Size(512, 640)}),
        ("a cat -- w 512", {"prompt": "a cat", "size": Size(512, 768)}),
        ("a {cat} __x__", {"prompt": "a {cat} __x__"}),
        ("semi--detached", {"prompt": "semi--detached"}),
        ("w 512 wide", {"prompt": "w 512 wide"}),
    ],
)  # fmt: skip
def test_options_of_a_line(line, wanted):
    assert parsed(line) == wanted


def test_gradual_latent_of_a_line():
    start = replace(DEFAULTS, sampler="euler_a_karras")
    assert parse_line("a --gle 2", start).gradual_latent == GradualLatent(650, every_n_steps=2)
    line = "a --glr 0.4 --gls 1 --glsn 0.5 --glus 3, 0.5,0.5,0 --glt 500"
    wanted = GradualLatent(500, 0.4, 1.0, 3, 0.5, Unsharp(3, 0.5, 0.5, False))
    assert parse_line(line, start).gradual_latent == wanted


def test_effects_of_the_command_line_are_where_a_line_starts():
    start = replace(DEFAULTS, sampler="euler_a", deep_shrink=DeepShrink(ratio=0.4), gradual_latent=GradualLatent(300))
    assert not parse_line("a", start).deep_shrink.is_on
    assert parse_line("a --dst1 700", start).deep_shrink == DeepShrink(3, 700, ratio=0.4)
    assert parse_line("a --glr 0.7", start).gradual_latent == GradualLatent(300, 0.7)
    on = replace(start, deep_shrink=DeepShrink(1))
    assert parse_line("a", on).deep_shrink == DeepShrink(1) and parse_line("a --dsr 0.3", on).deep_shrink.depth_1 == 1


@pytest.mark.parametrize(
    ("line", "marked", "words", "fix"),
    [
        ("a --t 1.5", "1.5", "--t 1.5: the value must be above 0 and at most 1", ""),
        ("a --GLT 400 --w 64", "--GLT", "--GLT cannot act: Gradual Latent is for euler_a, not for euler", "euler_a"),
        ("a --dst2 400", "--dst2", "--dst2 cannot act: there is no second depth", "--dsd2"),
        ("a --dsd2 4 --w 64", "--dsd2", "acts from timestep 650 down to 650, so never", "--dst2"),
        ("a --dsd1 9", "9", "must lie between 0 and 8", ""),
        ("a --dsr 1", "1", "must lie above 0 and below 1", ""),
        ("a --gls 1.5", "1.5", "must lie above 0 and not above 1", ""),
        ("a --glsn 11", "11", "must lie between 0 and 10", ""),
        ("a --glus 4,1,1", "4,1,1", "must begin with an odd number", ""),
        ("a --ss euler", "--ss euler", "is an option of the sample prompts of training; here --sampler", "remove"),
        ("a --cn x.png", "--cn x.png", "here --guide_image_path", "remove it"),
        ("a --fs 3", "--fs 3", "is for other models", "remove it"),
        ("a --am2 3", "--am2", "--am2 in a prompt is not known", "did you mean --am?"),
        ("a --width 3", "--width", "--width in a prompt is not known", "did you mean --w?"),
        ("a --q 3", "--q", "--q in a prompt is not known", "known: --w, --h"),
        ("well-known --- dashes", "---", "is not known", "two dashes after a space"),
        ("a --w wide --h 64", "wide", "--w wide: the value is not readable", ""),
        ("a --w 512px", "512px", "the value is not readable", ""),
        ("a --w 5.5", "5.5", "the value is not readable", ""),
        ("a --w", "", "the value is missing", ""),
        ("a --n --w 64", "", "--n: the value is missing", ""),
        ("a --am ,.", ",.", "not readable", ""),
        ("a --ow 0", "0", "must be 1 or more", ""),
        ("a --w 99999", "99999", "must be 32768 or less", ""),
        ("a --d 9223372036854775808", "9223372036854775808", "must be below 2^63", ""),
        ("a --d 5 --l 1e999", "1e999", "is too large", ""),
        ("a --s " + "9" * 5000, "9" * 48, "is too long", ""),
        ("a --nl 2 --l 1", "--nl", "there is no guidance at scale 1", "remove it"),
        ("a --f ../x", "../x", "without a folder", ""),
        ("a --f x.bmp", "x.bmp", "must end in .png", ""),
        ("a --f ..", "..", "cannot be a file's name", ""),
        ("a cat AND a dog --w 64", "AND", "there are none that do so", "small letters"),
    ],
)  # fmt: skip
def test_what_cannot_act_is_shown_with_a_caret(line, marked, words, fix):
    with pytest.raises(UserError) as error:
        parse_line(PromptLine(line, "p.txt line 3"), DEFAULTS)
    (problem,) = error.value.problems
    assert words in problem.what and fix in problem.fix
    where, shown, carets = problem.where.split("\n")
    assert where == "p.txt line 3"
    place = len(carets) - len(carets.lstrip())
    assert carets.strip() == "^" * max(1, len(marked) if len(line) < 100 else len(carets.strip()))
    assert shown[place : place + len(marked)] == marked


def test_sub_prompts_are_for_networks_that_act_in_parts_of_the_picture():
    line = "a cat AND a dog AND a red cross --w 64"
    for regions in (1, 2, 3):
        assert parse_line(line, DEFAULTS, regions=regions).prompt == "a cat AND a dog AND a red cross"
    with pytest.raises(UserError) as error:
        parse_line(PromptLine(line), DEFAULTS, regions=4)
    (problem,) = error.value.problems
    assert "4 networks act in parts of the picture, and the prompt has 3" in problem.what
    assert problem.where.endswith("    " + "^" * 31)
    assert parse_line("a cat", DEFAULTS, regions=1).prompt == "a cat"


def test_all_problems_of_a_line_are_told_together():
    with pytest.raises(UserError) as error:
        parse_line("a AND b --q 1 --w x", DEFAULTS)
    assert len(error.value.problems) == 3


def test_text_after_a_value_is_named(caplog):
    assert parse_line("a cat --s 30 and more", DEFAULTS).steps == 30
    assert '"and more" after the value is not read' in caplog.text


def test_sides_are_rounded_down_to_latent_cells_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert parse_line("a --w 517 --h 3", DEFAULTS).size == Size(512, 64)
    assert "517 pixels: taking 512" in caplog.text and "3 pixels: taking 64" in caplog.text


def test_open_sides_take_the_size_of_the_model():
    start = replace(DEFAULTS, size=Size(OPEN, OPEN))
    assert with_open_sides(parse_line("a --w 512", start), Size(128, 128)).size == Size(512, 128)
    assert with_open_sides(parse_line("a", start), Size(128, 96)).size == Size(128, 96)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("a", ()), ("a --d 5,6 --w 3", (5, 6)), ("a --D 5 --d 7", (7,)), ("a --d \0", ()), ("a --d 1\0", ()),
     ("--d 4", (4,)), ("a --dd 4", ()), ("a --d 3, 4 text", (3, 4))],
)  # fmt: skip
def test_seeds_are_found_before_words_are_chosen(text, seeds):
    assert seeds_of(text) == seeds


def test_sub_prompts_are_told_apart():
    assert split_and("a AND b, c AND d") == ["a", "b, c", "d"]
    assert split_and("rANDom and x") == ["rANDom and x"]


LINES = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from([" --w ", " --h ", " --d ", " --s ", " --l ", " --nl ", " --n ", " --am ", " --f ", " --ct "]),
        st.sampled_from(["512", "1e400", "-3", "9" * 30, "1,2", "none", ".5", " AND ", " --", "--", "{a|b}"]),
    ),
    max_size=8,
).map("".join)


@given(LINES)
@example(" --w 64 --w")
@example("--")
def test_any_line_is_a_request_or_an_explanation(line):
    try:
        request = parse_line(line, DEFAULTS)
    except UserError as error:
        assert all(problem.what and "^" in problem.where for problem in error.problems)
        assert str(error)
        return
    for value in (request.scale, request.negative_scale or 0, *(request.network_muls or ())):
        assert math.isfinite(value)
    assert request.raw == line.strip() and request.raw.startswith(request.prompt)
    assert 1 <= request.steps <= 1000 and all(side >= 64 and side % 8 == 0 for side in request.size)


@given(st.text().filter(lambda text: "--" not in text and " AND " not in f" {text} "))
def test_a_line_without_options_is_its_prompt(text):
    assert parse_line(text, DEFAULTS) == replace(DEFAULTS, prompt=text.strip(), raw=text.strip())


@pytest.mark.parametrize(
    ("text", "start", "end", "shown", "carets"),
    [
        ("abc", 1, 2, "abc", " ^"),
        ("abc", 3, None, "abc", "   ^"),
        ("漢字abc", 2, 4, "漢字abc", "    ^^"),
        ("漢字", 0, 2, "漢字", "^^^^"),
        ("e\u0301a", 2, 3, "e\u0301a", " ^"),
        ("a\tb", 2, 3, "a b", "  ^"),
        ("x" * 60 + "!" + "y" * 60, 60, 61, "…" + "x" * 48 + "!" + "y" * 24 + "…", " " * 49 + "^"),
    ],
)
def test_a_caret_stands_under_its_place(text, start, end, shown, carets):
    assert caret(text, start, end, indent=0).split("\n") == [shown, carets]


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
    assert file_lines(path) == [PromptLine("one", f"{path} line 1"), PromptLine("two --s 3", f"{path} line 4")]
    assert prompt_lines(str(path), "other") == file_lines(path)
    assert prompt_lines(None, " a ") == [PromptLine("a", "--prompt")] and prompt_lines(None, None) == []
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
