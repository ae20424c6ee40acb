"""TOML reading with line numbers, and writing."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config.toml_file import key_lines, read_toml, toml_value
from library.errors import UserError

VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=3),
)
TEXTS = [
    '"a"',
    "'a # b'",
    '"""one\ntwo = 2\n"""',
    "'''\n[x]\n'''",
    "[\n 1, # a = 3\n 2,\n]",
    "{ a = 1 }",
    '"\\""',
    "1.5",
]


@given(VALUES)
def test_written_values_are_read_back(value):
    assert tomllib.loads(f"key = {toml_value(value)}") == {"key": value}


@given(st.lists(st.tuples(st.sampled_from(["plain", "[table]", "[[array]]", "# comment", ""]), st.sampled_from(TEXTS))))
def test_every_key_is_found_on_its_line(items):
    text, expected, line = "", {}, 1
    path: tuple[str | int, ...] = ()
    arrays = 0
    for number, (head, value) in enumerate(items):
        if head == "[table]":
            path = (f"table{number}",)
            text += f"  [table{number}]  # = [[\n"
            line += 1
        elif head == "[[array]]":
            path = ("array", arrays)
            arrays += 1
            text += "[[array]]\n"
            line += 1
        elif head != "plain":
            text += head + "\n"
            line += 1
        expected[(*path, f"key{number}")] = [line]
        text += f"key{number} = {value}\n"
        line += 1 + value.count("\n")
    tomllib.loads(text)
    found = key_lines(text)
    assert {key: lines for key, lines in found.items() if str(key[-1]).startswith("key")} == expected


def test_nested_arrays_of_tables_are_told_apart():
    text = "[[a]]\n[[a.b]]\nx = 1\n[[a.b]]\nx = 2\n[[a]]\n[[a.b]]\nx = 3\n[a.b.c]\ny.z = 4\n'q r' = 5\n"
    lines = key_lines(text)
    assert lines["a", 0, "b", 0, "x"] == [3]
    assert lines["a", 0, "b", 1, "x"] == [5]
    assert lines["a", 1, "b", 0, "x"] == [8]
    assert lines["a", 1, "b", 0, "c", "y", "z"] == [10]
    assert lines["a", 1, "b", 0, "c", "q r"] == [11]


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("a = 1\nb = 2\na = 3\n", "a is given twice", "lines 1 and 3"),
        ("[s]\na = 1\n\n[s]\nb = 1\n", "s is given twice", "lines 1 and 4"),
        ("a = 1\nb = yes\n", "not TOML", "line 2"),
        ('a = "C:\\images"\n', "not TOML", "line 1"),
        ("a = 1\nb = [1,\n", "not TOML", "bad.toml"),
    ],
)
def test_broken_file_names_the_line(tmp_path, text, what, where):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_toml(path)
    problem = caught.value.problems[0]
    assert what in problem.what
    assert where in problem.where


def test_backslash_is_explained(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('dir = "C:\\images"\n')
    with pytest.raises(UserError) as caught:
        read_toml(path)
    assert "single quotes" in caught.value.problems[0].fix


def test_encodings_of_windows_editors(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\nb = 2\r\n")
    file = read_toml(path)
    assert file.data == {"a": 1, "b": 2}
    assert file.where("b").endswith("a.toml line 2")
    path.write_bytes("a = 'é'".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_toml(path)
