"""Prompts that a Python file makes: what it is called with, and the pictures that come of it."""

import random
import re

import pytest

from library.config.choices import ROOT
from library.config.cli import make_config
from library.errors import UserError
from library.inference.plan import PlanOptions, plan
from library.inference.prompt_module import prompt_module
from library.inference.request import GenRequest

PROGRAM = """
calls = []


class Prompter:
    def __init__(self, words):
        self.words, self.at = words, 0

    def shuffle(self):
        self.words = self.words[::-1]

    def __call__(self, args, pipe, seed_random, iter_seed, prompt_index, global_step):
        calls.append((pipe, iter_seed, prompt_index, global_step, seed_random.random()))
        if prompt_index == len(self.words):
            return None
        return f" a {self.words[prompt_index]} " + "{x|y} --s 3"


def get_prompter(args, pipe, networks):
    assert pipe is None and networks == [] and args.images_per_prompt == 2
    return Prompter(args.prompter_module_args.split(","))
"""

SHUFFLING = """
class Prompter:
    def shuffle(self): raise RuntimeError("no order")

def get_prompter(*told):
    return Prompter()
"""


@pytest.fixture
def asked(tmp_path):
    """asked(text, **options): the prompts of a program, once it has been written into a file."""

    def make(text=PROGRAM, **options):
        path = tmp_path / "prompts.py"
        path.write_text(text, "utf-8")
        chosen = {"images_per_prompt": 2, "seed": 7, "prompter_module_args": "red,green", **options}
        return prompt_module(make_config("sdxl_gen_img", ckpt="tiny", from_module=str(path), **chosen))

    return make


def planned(lines, **how):
    return plan(lines, GenRequest(), PlanOptions(images_per_prompt=2, seed=7, **how))


def test_a_program_makes_the_prompts_of_every_time_through(asked, tmp_path):
    lines = asked()
    made = planned(lines, n_iter=2)
    stream = random.Random(7)
    assert [request.seed for request in made] == [stream.randint(0, 2**31 - 1) for _ in range(8)]
    assert [request.prompt[:-2] for request in made] == ["a red", "a red", "a green", "a green"] * 2
    assert all(request.steps == 3 and request.prompt[-1] in "xy" for request in made)
    calls = lines._prompter.__call__.__globals__["calls"]
    own = random.Random(7)
    assert calls == [(None, None, i, 2 * i, own.random()) for _ in range(2) for i in range(3)]
    assert lines(None)[1].where == f"{tmp_path / 'prompts.py'} prompt 2"


def test_pictures_of_one_time_through_share_seeds_that_the_program_knows(asked):
    lines = asked(iter_same_seed=True, shuffle_prompts=True)
    made = planned(lines, n_iter=2, iter_same_seed=True, shuffled=True)
    stream = random.Random(7)
    first, second = ([stream.randint(0, 2**31 - 1) for _ in range(2)] for _ in range(2))
    assert [request.seed for request in made] == [*first, *first, *second, *second]
    assert [request.prompt[2:5] for request in made] == ["gre", "gre", "red", "red", "red", "red", "gre", "gre"]
    assert [call[1] for call in lines._prompter.__call__.__globals__["calls"]] == [first[0]] * 3 + [second[0]] * 3


def test_a_program_may_have_dataclasses(asked):
    text = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Prompter:
    words: list[str]

    def __call__(self, *told):
        return self.words.pop() if self.words else None

def get_prompter(args, pipe, networks):
    return Prompter(["a cat"])
"""
    assert [request.prompt for request in planned(asked(text))] == ["a cat", "a cat"]


def test_a_single_prompt_takes_the_seed_itself(asked):
    lines = asked(prompter_module_args="red")
    (request,) = plan(lines, GenRequest(), PlanOptions(seed=7))
    assert request.seed == 7


@pytest.mark.parametrize(
    ("text", "options", "what"),
    [
        ("x = 1", {}, "no function get_prompter"),
        ("def get_prompter(*all): return lambda *all: 3", {}, "prompt 1 is no text but int"),
        ("def get_prompter(*all): return lambda *all: 'a'", {}, "there is no end after 100000 prompts"),
        ("def get_prompter(*all): return lambda *all: None", {"shuffle_prompts": True}, "no method shuffle"),
    ],
)
def test_what_makes_no_prompts_is_explained(asked, text, options, what):
    with pytest.raises(UserError, match=what):
        planned(asked(text, **options))


@pytest.mark.parametrize(
    ("text", "options", "what", "line"),
    [
        ("import no_such_module", {}, "ModuleNotFoundError: No module named 'no_such_module'", 1),
        ("x = 1\ndef get_prompter(:", {}, "SyntaxError: invalid syntax", 2),
        ("def get_prompter(*all):\n    return 1 / 0", {}, "ZeroDivisionError: division by zero", 2),
        ("def get_prompter(*all):\n\n    return lambda *all: all['a']", {}, "TypeError: tuple indices", 3),
        (SHUFFLING, {"shuffle_prompts": True}, "RuntimeError: no order", 3),
    ],
)
def test_a_program_that_fails_is_named_with_its_line(asked, text, options, what, line):
    with pytest.raises(UserError, match=re.escape(f"the program failed with {what}")) as caught:
        planned(asked(text, **options))
    assert caught.value.problems[0].where.endswith(f"prompts.py line {line}")


def test_a_file_of_prompts_comes_before_a_program(asked, tmp_path):
    (tmp_path / "prompts.txt").write_text("a", "utf-8")
    assert asked(from_file=str(tmp_path / "prompts.txt")) is None
    options = {"ckpt": "tiny", "from_file": str(tmp_path / "prompts.txt"), "prompt": "a"}
    notices = make_config("sdxl_gen_img", **options, from_module=str(tmp_path / "prompts.py")).notices
    assert [notice.split()[0] for notice in notices] == ["prompt", "from_module"]


def test_the_program_of_the_page_makes_prompts(asked):
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "prompts.md").read_text("utf-8"), re.DOTALL)[1]
    made = planned(asked(program))
    assert [request.prompt for request in made] == ["a red cat"] * 2 + ["a green cat"] * 2
    assert {request.scale for request in made} <= {5.0, 7.0}
