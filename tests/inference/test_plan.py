"""The pictures of a run: order, words and seeds."""

import random

import pytest

from library.config.choices import ROOT
from library.errors import UserError
from library.inference.plan import PlanOptions, plan
from library.inference.prompt_source import PromptLine
from library.inference.request import GenRequest
from library.inference.wildcards import Wildcards


def planned(*texts, wildcards=None, **how):
    lines = [PromptLine(text, f"p.txt line {number}") for number, text in enumerate(texts, start=1)]
    return plan(lines, GenRequest(), PlanOptions(**how), wildcards=wildcards)


def seeds(*texts, **how):
    return [request.seed for request in planned(*texts, **how)]


def stream(seed, count):
    chance = random.Random(seed)
    return [chance.randint(0, 2**31 - 1) for _ in range(count)]


def test_one_picture_takes_the_seed_itself_and_several_sd_scripts_stream():
    assert seeds("a", seed=7) == [7]
    assert seeds("a", "b", seed=7, images_per_prompt=2, n_iter=2) == stream(7, 8)
    assert seeds("{e$$a|b}", seed=7) == stream(7, 2)


def test_seeds_in_a_prompt_are_used_up_picture_by_picture_in_every_iteration():
    first, second = stream(7, 2)
    assert seeds("a --d 1,2", seed=7, images_per_prompt=3, n_iter=2) == [1, 2, first, 1, 2, second]
    assert seeds("a --d 1", "b", seed=7) == [1, first]


def test_without_a_seed_pictures_differ():
    assert len(set(seeds("a", images_per_prompt=20))) == 20


def test_settings_belong_to_one_prompt():
    a, b, c = planned("a", "b --w 64 --s 3 --n x --l 2 --nl 1 --am 2 --ow 9 --ct 4 --f y --c z", "a", seed=1)
    assert (b.size.w, b.steps, b.negative, b.scale, b.negative_scale, b.name) == (64, 3, "x", 2.0, 1.0, "y")
    assert a == GenRequest(prompt="a", raw="a", seed=a.seed) and c == GenRequest(prompt="a", raw="a", seed=c.seed)


def test_pictures_that_differ_in_words_and_seed_only_share_a_batch():
    a, b, c = (request.settings() for request in planned("a --n x --d 1 --f y --c z", "b --d 2,3", "b --l 2", seed=1))
    assert a == b != c


def test_the_same_line_and_seed_say_the_same_whatever_else_is_drawn():
    line = "{red|green|blue|white|black} {cat|dog|cow} {1|2|3|4|5|6|7|8} --d 11,12,13"
    alone = planned(line, images_per_prompt=3)
    among = planned("{x|y}", line, "{z|w} --d 5", images_per_prompt=3, seed=4, n_iter=2)
    assert among[3:6] == alone == among[12:15]
    assert len({request.prompt for request in alone}) == 3
    (again,) = {request.prompt for request in planned(line.split(" --d")[0], seed=11)}
    assert again == alone[0].prompt


def test_raw_is_a_line_that_draws_the_same_again():
    for request in planned(r"{a|b} \{c\} {__x__|d} --n {e|f} --w {64|128}", seed=3, images_per_prompt=6):
        assert request.raw.split(" --n")[0] in (r"a \{c\} __x__", r"b \{c\} __x__", r"a \{c\} d", r"b \{c\} d")
        assert r"\{c\}" in request.raw and "{c}" in request.prompt and request.negative in ("e", "f")
        (again,) = planned(request.raw, seed=request.seed)
        assert again == request


def test_seeds_may_stand_in_a_choice():
    request, other = planned("{e$$a --d 5|b --d 6}", seed=1)
    assert (request.prompt, request.seed, other.prompt, other.seed) == ("a", 5, "b", 6)


def test_combinations_share_the_seeds_of_their_line():
    pictures = planned("{e$$a|b} {x|y|z} --d 5,6", images_per_prompt=2)
    assert [request.seed for request in pictures] == [5, 5, 6, 6]
    assert [request.prompt[0] for request in pictures] == ["a", "b", "a", "b"]
    assert pictures[0].prompt[1:] == pictures[1].prompt[1:]


def test_prompts_of_one_iteration_can_share_their_seeds():
    one, two, three, four = stream(7, 4)
    found = seeds("a", "b --d 3", "c", seed=7, iter_same_seed=True, images_per_prompt=2, n_iter=2)
    assert found == [one, two, 3, two, one, two, three, four, 3, four, three, four]
    assert len(set(seeds("a", "b", iter_same_seed=True, n_iter=3))) == 3


def test_shuffling_reorders_every_iteration_and_keeps_the_prompts():
    texts = [str(number) for number in range(20)]
    once, again = ([r.prompt for r in planned(*texts, seed=5, shuffled=True, n_iter=2)] for _ in range(2))
    assert once == again
    first, second = once[:20], once[20:]
    assert sorted(first) == sorted(second) == sorted(texts) and len({*map(tuple, (texts, first, second))}) == 3
    assert seeds(*texts, seed=5, shuffled=True) == seeds(*texts, seed=5)


def test_the_problems_of_all_lines_are_told_at_once_with_file_and_line(tmp_path):
    (tmp_path / "x.txt").write_text("fine --q 3\n")
    with pytest.raises(UserError) as error:
        planned(
            "a --w x", "fine", "{a", "b AND c", "__x__", n_iter=3, images_per_prompt=2, wildcards=Wildcards(tmp_path)
        )
    places = sorted(problem.where.split("\n")[0] for problem in error.value.problems)
    chosen = "p.txt line 5, with the words that were chosen"
    assert places == ["p.txt line 1", "p.txt line 3", "p.txt line 4", chosen]


def test_the_page_about_prompts_says_what_happens():
    page = (ROOT / "docs" / "prompts.md").read_text("utf-8")
    with pytest.raises(UserError) as error:
        plan([PromptLine("a red cat --width 512", "prompts.txt line 3")], GenRequest(), PlanOptions())
    assert f"error: {error.value}".replace("\n", "\n    ") in page
