"""Prompts out of pictures that generators have written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.errors import UserError
from library.inference.parameters_text import MadeBy, NetworkUse, parameters_text
from library.inference.picture_text import comment_text, line_of, prompts_of_pictures, texts_of
from library.inference.plan import PlanOptions, plan
from library.inference.prompt_source import PromptLine
from library.inference.request import GenRequest
from library.inference.writer import PARAMETERS, png_text, save_picture

REQUEST = GenRequest("a (red:1.2) {cat}, ein grüner 猫", "blurry, bad", steps=3, seed=9, scale=2.0, sampler="euler")
WEB = "a cat,\nred <lora:x:0.8> fur\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1"


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_pictures_of_this_suite_give_their_words_back(tmp_path, name):
    made = MadeBy("m.safetensors", "", (NetworkUse("n.safetensors", "networks.lora", 0.5),))
    text = png_text(REQUEST) | {PARAMETERS: parameters_text(REQUEST, made)}
    save_picture(Image.new("RGB", (8, 8)), tmp_path / name, text)
    (line,) = prompts_of_pictures([tmp_path / name])
    assert line == PromptLine(r"a (red:1.2) \{cat\}, ein grüner 猫 --n blurry, bad", str(tmp_path / name))
    (again,) = plan([line], GenRequest(), PlanOptions(seed=1))
    assert (again.prompt, again.negative) == (REQUEST.prompt, REQUEST.negative)
    assert (again.seed, again.steps, again.scale, again.sampler) == (1, 50, 7.5, "ddim")  # not the picture's


def test_sd_scripts_chunks_come_before_a1111s(caplog):
    def text(**texts):
        line = line_of({key.replace("_", "-"): value for key, value in texts.items()}, where="x")
        return line and line.text

    assert text(prompt="a dog", parameters=WEB) == "a dog"
    assert text(prompt="a dog --w 64", negative_prompt="bad") == "a dog --w 64 --n bad"
    assert text(prompt='{"3": {"inputs": {}}}', parameters=WEB) == "a cat, red fur --n blurry"
    assert "networks that the prompt names are not loaded by it: x" in caplog.text
    assert text(parameters="only words") == "only words" and text(prompt=r"\{a|b}") == r"\{a|b\}"
    assert text(negative_prompt="bad") is text(prompt="") is text() is None
    assert text(parameters="Negative prompt: bad\nSteps: 1, Sampler: x, Seed: 2") == "--n bad"


@pytest.mark.parametrize("code", ["utf-16-be", "utf-16-le", "utf-16"])
def test_comments_are_read_in_every_order_of_bytes(code):
    assert comment_text(b"UNICODE\0" + WEB.encode(code)) == WEB
    assert comment_text(b"ASCII\0\0\0" + WEB.encode()) == comment_text(WEB) == comment_text(WEB.encode()) == WEB
    assert comment_text(None) == comment_text(b"") == comment_text(b"\0" * 8) == ""


@given(st.binary(max_size=60), st.sampled_from([b"", b"UNICODE\0", b"ASCII\0\0\0", b"\0" * 8]))
def test_any_comment_is_some_text(data, code):
    assert isinstance(comment_text(code + data), str)


@given(st.dictionaries(st.sampled_from(["prompt", "negative-prompt", "parameters"]), st.text(max_size=200)))
def test_any_texts_give_a_line_without_choices_or_none(texts):
    line = line_of(texts, where="x")
    if line is not None and " --" not in line.text and not line.text.startswith("--"):
        (request,) = plan([line], GenRequest(), PlanOptions(seed=1))
        assert request.prompt == line.text.replace(r"\{", "{").replace(r"\}", "}")


def test_folders_stand_for_their_pictures_and_all_problems_are_told(tmp_path):
    folder, empty = tmp_path / "folder", tmp_path / "empty"
    folder.mkdir()
    empty.mkdir()
    for name in ("b.png", "a.png"):
        save_picture(Image.new("RGB", (8, 8)), folder / name, {"prompt": name})
    (folder / "notes.txt").write_text("no picture")
    late = PngInfo()
    late.add(b"tEXt", b"prompt\0late", after_idat=True)
    Image.new("RGB", (8, 8)).save(folder / "c.png", pnginfo=late)
    assert [line.text for line in prompts_of_pictures([folder, str(folder / "b.png")])] == [
        "a.png", "b.png", "late", "b.png",
    ]  # fmt: skip
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.jpg")
    (tmp_path / "torn.png").write_bytes((folder / "a.png").read_bytes()[:20])
    (tmp_path / "text.png").write_text("no picture")
    names = ["plain.jpg", "torn.png", "text.png", "none.png", "empty"]
    with pytest.raises(UserError) as error:
        prompts_of_pictures([tmp_path / name for name in names])
    assert [problem.where.rsplit("/")[-1] for problem in error.value.problems] == names
    assert "holds no prompt" in str(error.value) and "does not exist" in str(error.value)
    assert texts_of(tmp_path / "plain.jpg") == {}
