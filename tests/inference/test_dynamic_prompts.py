"""Choices, enumerations and wildcards in prompts (gen_img.md §4)."""

import random
from collections import Counter
from itertools import permutations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from library.errors import UserError
from library.inference.dynamic_prompts import MAX_FORMS, _count, fixed_text, forms, read_template, render, unescape
from library.inference.prompt_source import PromptLine
from library.inference.wildcards import Wildcards

NONE = Wildcards()


def tree(text, wildcards=NONE):
    return read_template(PromptLine(text, "p.txt line 2"), wildcards)


def words(text, seed=0, wildcards=NONE):
    """What a line without e$$ says at a seed."""
    (form,) = forms(tree(text, wildcards))
    return render(form, random.Random(seed), wildcards)


def every(text, wildcards=NONE):
    """What the forms of a line say at seed 0."""
    return [render(form, random.Random(0), wildcards) for form in forms(tree(text, wildcards))]


def seen(text, wildcards=NONE, times=300):
    return Counter(words(text, seed, wildcards) for seed in range(times))


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{red}", {"red"}),
        ("{a|}", {"a", ""}),
        ("{2$$a|b}", {"a, b", "b, a"}),
        ("{1-2$$ and $$a|b}", {"a", "b", "a and b", "b and a"}),
        ("{2-1$$ and $$a|b}", {"a", "b", "a and b", "b and a"}),
        ("{0-1$$a|b}", {"", "a", "b"}),
        ("{1-9$$+$$a|b}", {"a", "b", "a+b", "b+a"}),
        ("{0$$a|b}", {""}),
        ("{ and $$a}", {"a"}),
        ("{a|{b|c}} d", {"a d", "b d", "c d"}),
        ("{2$$-$${a|b}|c}", {"a-c", "b-c", "c-a", "c-b"}),
        ("{x{1|2}y|z}", {"x1y", "x2y", "z"}),
        (r"\{a|b\} {c|d}", {r"\{a|b\} c", r"\{a|b\} d"}),
        (r"{\{|\}}", {r"\{", r"\}"}),
        ("{$$a|b}", {"$$a", "b"}),
        ("a --w {64|128} --n {x|y}", {f"a --w {w} --n {n}" for w in (64, 128) for n in "xy"}),
    ],
)
def test_choices_can_be_all_that_they_list_and_nothing_else(text, possible):
    assert set(seen(text)) == possible


def test_choices_are_fair():
    assert all(50 < count < 150 for count in seen("{a|b|c}").values())
    assert len(seen("{3$$a|b|c}")) == 6 and all(25 < count < 80 for count in seen("{3$$a|b|c}").values())


def test_words_are_those_of_pythons_generator():
    chance = random.Random(5)
    wanted = []
    for options in (["a", "b", "c"], ["d", "e"]):
        wanted.append(" ".join(chance.sample(options, chance.randint(1, 2))))
    assert words("{1-2$$ $$a|b|c}, {1-2$$ $$d|e}", 5) == ", ".join(wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain", ["plain"]),
        ("{e$$a|b} c", ["a c", "b c"]),
        ("{E$$a|b}{e$$1|2}", ["a1", "a2", "b1", "b2"]),
        ("{e$$1-2$$+$$a|b|c}", ["a", "b", "c", "a+b", "a+c", "b+c"]),
        ("{e$$0-2$$a|b}", ["", "a", "b", "a, b"]),
        ("{e$$2$$a|b|c}", ["a, b", "a, c", "b, c"]),
        ("{e$$a|x{e$$1|2}}", ["a", "x1", "x2"]),
        ("{e$$2$$+$$a|{e$$1|2}|b}", ["a+1", "a+2", "a+b", "1+b", "2+b"]),
        ("{q|{e$$a|b}}", None),
    ],
)
def test_every_combination_is_a_prompt(text, wanted):
    found = every(text)
    if wanted is None:  # a choice around an enumeration: one prompt for each of its values
        assert len(found) == 2 and set(found) <= {"q", "a", "b"}
    else:
        assert found == wanted


def test_choices_beside_an_enumeration_stay_choices():
    first, second = forms(tree("{e$$a|b} {x|y}"))
    assert {render(first, random.Random(seed), NONE) for seed in range(20)} == {"a x", "a y"}
    assert {render(second, random.Random(seed), NONE) for seed in range(20)} == {"b x", "b y"}


@pytest.mark.parametrize(
    ("text", "marked", "words"),
    [
        ("a {b|c", "{", "is not closed"),
        ("a {b|{c}", "{", "is not closed"),
        ("a b} c", "}", "closes nothing"),
        ("a {} b", "{}", "nothing in these braces"),
        ("{5$$a|b}", "5", "5 different options are asked for, and there are 2"),
        ("{3-4$$a|b}", "3-4", "3 different options are asked for"),
        ("{-1$$a|b}", "-1", "no count"),
        ("{1-2-3$$a|b}", "1-2-3", "no count"),
        ("{1-$$a|b}", "1-", "no count"),
        ("{9999999$$a|b}", "9999999", "no count"),
        ("{" * 60 + "a" + "}" * 60, "{", "more than 40 deep"),
        ("x {e$$7$$" + "|".join("abcdefghijklmnopqrst") + "}", None, f"more than {MAX_FORMS} combinations"),
        ("{e$$a|b}" * 14, None, f"more than {MAX_FORMS} combinations"),
    ],
)
def test_mistakes_are_shown_with_a_caret(text, marked, words):
    with pytest.raises(UserError) as error:
        forms(tree(text))
    (problem,) = error.value.problems
    assert words in problem.what
    where, shown, carets = problem.where.split("\n")
    assert where == "p.txt line 2"
    place = len(carets) - len(carets.lstrip())
    if marked:
        assert shown[place : place + len(carets.strip())] == marked


@pytest.mark.parametrize(
    ("text", "count"),
    [("{e$$1-2$$a|b|c}", 6), ("{e$$2-3$$a|{e$$b|c}|d|e}", 16), ("{e$$a|b}{x|{e$$c|d|e}}", 6), ("{a|b}", 1)],
)
def test_combinations_are_counted_before_they_are_made(text, count):
    assert _count(tree(text)) == len(forms(tree(text))) == count


# --- wildcards ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cards(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in {
        "colour": "\ufeffred\n\n# no\nblue\n",
        "sub/pet": "{cat|dog}\n__colour__ bird\n",
        "loop": "a __sub/back__\n",
        "sub/back": "b __loop__\n",
        "empty": "# nothing\n",
        "self": "{__self__}\n",
        "enumerated": "{e$$a|b}\n",
        "broken": "fine\nfi{ne\n",
        "my-name.v2": "x\n",
    }.items():
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    return Wildcards(tmp_path)


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("a __colour__ car", {"a red car", "a blue car"}),
        ("__sub/pet__", {"cat", "dog", "red bird", "blue bird"}),
        ("{2$$ & $$__colour__}", {"red & blue", "blue & red"}),
        ("{__colour__|x}", {"red", "blue", "x"}),
        ("__my-name.v2___", {"x_"}),
        ("snake_case __ x __", {"snake_case __ x __"}),
    ],
)
def test_wildcards_are_lines_of_their_files(cards, text, possible):
    assert set(seen(text, cards)) == possible


def test_wildcards_can_be_enumerated(cards):
    assert every("{e$$__colour__}", cards) == ["red", "blue"]
    assert every("{e$$1-2$$+$$__colour__} {e$$a|b}", cards) == [
        f"{colour} {letter}" for colour in ("red", "blue", "red+blue") for letter in "ab"
    ]


def test_without_a_folder_wildcards_are_text():
    assert words("a __colour__ car") == "a __colour__ car"


@pytest.mark.parametrize(
    ("text", "where", "words", "fix"),
    [
        ("a __color__", "p.txt line 2", "there is no wildcard file", "did you mean __colour__?"),
        ("a __pet__", "p.txt line 2", "pet.txt", "sub/pet"),
        ("__empty__", "p.txt line 2", "holds no entry", "one entry per line"),
        ("__a/../../x__", "p.txt line 2", "leads out of wildcard_dir", ""),
        ("__loop__", "back.txt line 1", "leads to itself: __loop__ -> __sub/back__ -> __loop__", "remove it"),
        ("__self__", "self.txt line 1", "leads to itself: __self__ -> __self__", "remove it"),
        ("__enumerated__", "enumerated.txt line 1", "e$$ cannot stand in a wildcard file", "remove e$$"),
        ("{2$$__broken__}", "broken.txt line 2", "is not closed", ""),
    ],
)
def test_wildcards_that_lead_nowhere_are_explained(cards, text, where, words, fix):
    with pytest.raises(UserError) as error:
        every(text, cards)
    (problem,) = error.value.problems
    assert words in problem.what and fix in problem.fix
    assert "itself" not in words or problem.what.endswith(words)  # found at the first return
    first, _, carets = problem.where.split("\n")
    assert first.endswith(where) and "^" in carets


# --- properties --------------------------------------------------------------------------------------------------

ANY = st.text(alphabet="ab ,{}|$-0123eE\\_é漢", max_size=40)
PLAIN = st.text(st.characters(exclude_characters="{}|$\\_-", exclude_categories=("Cs",)), max_size=12)


@given(ANY, st.integers(0, 2**64))
@example("{" * 3000, 0)
@example("{e$$" + "a|" * 3000 + "}", 0)
@example("{e$$1000$$" + "a|" * 3000 + "}", 0)
@example("{" + "9" * 5000 + "$$a}", 0)
def test_any_text_is_a_prompt_or_an_explanation(text, seed):
    try:
        all_forms = forms(tree(text))
    except UserError as error:
        assert "^" in error.problems[0].where
        return
    assert 1 <= len(all_forms) == _count(tree(text)) <= MAX_FORMS
    for form in all_forms[:3]:
        said = render(form, random.Random(seed), NONE)
        assert said == render(form, random.Random(seed), NONE)
        assert not set(unescape(said)) - set(text) - {",", " "}
        assert every(said) == [said]  # what was chosen is a prompt without choices


@given(ANY.filter(lambda text: not set("{}") & set(text)))
def test_text_without_braces_is_conserved(text):
    assert every(text) == [text] and fixed_text(tree(text)) == text


@given(ANY)
def test_escaped_text_is_conserved(text):
    plain = text.replace("\\", "")
    escaped = plain.replace("{", r"\{").replace("}", r"\}")
    assert [unescape(said) for said in every(escaped)] == [plain]


@given(PLAIN, st.lists(PLAIN, min_size=1, max_size=4), PLAIN, st.data())
def test_a_group_says_its_options_between_the_text_around_it(before, options, after, data):
    if options == [""]:
        return
    count = data.draw(st.integers(0, len(options)))
    text = f"{before}{{{count}$$;$${'|'.join(options)}}}{after}"
    allowed = {before + ";".join(chosen) + after for chosen in permutations(options, count)}
    assert words(text, data.draw(st.integers(0, 99))) in allowed
