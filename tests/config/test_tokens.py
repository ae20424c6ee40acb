"""New tokens: the table of several, templates, names, and what is known of them before torch is imported."""

import pytest

from library.config.cli import make_config
from library.config.token_table import read_templates, template_file, token_specs
from library.errors import UserError
from library.models.token_names import problems_in

RUN = "sdxl_train_textual_inversion"


@pytest.fixture
def config(complete):
    """config(**options): of a textual inversion run."""
    del complete["network_module"]
    return lambda **options: make_config(RUN, **{**complete, **options})


def test_one_token_comes_from_the_options(config, tmp_path):
    (spec,) = token_specs(config(token_string="zxq", init_word="red star", num_vectors_per_token=3))
    assert (spec.name, spec.num_vectors, spec.init_word, spec.init_file) == ("zxq", 3, "red star", None)
    (tmp_path / "start.safetensors").touch()
    (spec,) = token_specs(config(token_string="zxq", init_word=str(tmp_path / "start.safetensors")))
    assert spec.init_file is not None and spec.num_vectors == 1
    (spec,) = token_specs(config(token_string="zxq", weights=str(tmp_path / "start.safetensors")))
    assert spec.num_vectors is None, "the file says how many"


def test_output_is_named_after_the_token(config):
    assert config(token_string="zxq").save.output_name == "zxq"
    assert config(token_string="zxq", output_name="mine").save.output_name == "mine"


def test_a_table_names_several_tokens(config, tmp_path):
    table = tmp_path / "tokens.toml"
    table.write_text('[tokens.zxq]\ninit_word = "red"\n[tokens.qwy-a]\nnum_vectors_per_token = 2\n')
    first, second = token_specs(config(token_file=str(table)))
    assert (first.name, first.init_word, first.num_vectors) == ("zxq", "red", None)
    assert (second.name, second.num_vectors) == ("qwy-a", 2)
    assert second.where.endswith("tokens.toml line 3")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "token_file holds no tokens"),
        ("[words.zxq]\n", "token_file holds no tokens"),
        ("[tokens]\nzxq = 3\n", "tokens.zxq is not a table"),
        ("[tokens.zxq]\ninit = 'red'\n", "init is not a key of a token"),
        ("[tokens.zxq]\nnum_vectors_per_token = 0\n", "num_vectors_per_token is 0, not a whole number from 1 on"),
        ("[tokens.zxq]\n[tokens.ZXQ]\n", "the token ZXQ is there twice"),
        ("[tokens.'a,b']\n", "has ',' in it"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(config, tmp_path, text, what):
    (tmp_path / "tokens.toml").write_text(text)
    with pytest.raises(UserError, match=what) as caught:
        config(token_file=str(tmp_path / "tokens.toml"))
    assert "tokens.toml" in caught.value.problems[0].where


def test_templates_need_one_token(config, tmp_path):
    (tmp_path / "tokens.toml").write_text("[tokens.zxq]\n[tokens.qwy]\n")
    with pytest.raises(UserError, match="has room for one token"):
        config(token_file=str(tmp_path / "tokens.toml"), use_style_template=True)


@pytest.mark.parametrize(("name", "count"), [("use_object_template", 27), ("use_style_template", 19)])
def test_the_templates_that_come_along_are_as_many_as_those_of_sd_scripts(config, name, count):
    sentences = read_templates(template_file(config(token_string="zxq", **{name: True})))
    assert len(set(sentences)) == count
    assert all(sentence.count("{}") == 1 for sentence in sentences)


def test_own_templates_are_read(config, tmp_path):
    (tmp_path / "mine.txt").write_text("# mine\n\na {} in oil\n")
    cfg = config(token_string="zxq", token_template_file=str(tmp_path / "mine.txt"))
    assert read_templates(template_file(cfg)) == ("a {} in oil",)
    assert template_file(config(token_string="zxq")) is None


@pytest.mark.parametrize(("word", "is_known"), [("cat", True), ("Ing", True), ("!", True), ("zxq", False)])
def test_a_word_of_the_vocabulary_is_no_new_token(config, word, is_known):
    problems = problems_in(config(token_string=word))
    assert bool(problems) == is_known
    assert all(f"the token {word} is already in the vocabulary" in problem.what for problem in problems)
