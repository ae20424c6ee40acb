"""What every file of the repository promises: no private paths, no unfinished marks, pins that match the imports."""

import re
import subprocess
import sys
import tomllib

import pytest

from tests.arch import tree

TEXT = (".py", ".md", ".toml", ".txt", ".json", ".cfg", ".yml", ".yaml", "Makefile", "run", ".gitignore")

# The character classes keep this file from matching itself.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w./:~-])/(?:[w]ork|[r]oot|[h]ome/\w|[o]pt/\w|[U]sers/\w)|[A-Z]:\\\\?[U]sers",
    "the address of an index": r"[p]ypi\.org|[p]ythonhosted\.org|[d]ownload\.pytorch\.org|[c]onda\.anaconda\.org",
    "a secret": r"\b(?:[h]f_[A-Za-z]{20,}|[g]hp_\w{20,}|[B]EGIN [A-Z ]*PRIVATE KEY)",
    "a conflict mark": r"^(?:[<]{7} |[>]{7} )",
}
UNFINISHED = {
    "a note to oneself": r"\b(?:TO[D]O|FIX[M]E|X[X]X|HA[C]K)\b",
    "a stub": r"\braise NotImplemented",
    "a test that cannot fail": r"\bassert [T]rue\b",
    "a test that is switched off": r"pytest\.mark\.x[f]ail",
    "an error that is swallowed": r"^\s*except\s*:",
}
# Distribution of requirements.txt -> name that is imported, where they differ.
IMPORTED_AS = {"pillow": "PIL", "opencv-python-headless": "cv2", "lycoris-lora": "lycoris"}
OPTIONAL = {"xformers", "lycoris", "wandb"}
PART_OF = {"pydantic_core": "pydantic"}  # a package that pins another one of its own


def text_files() -> list[str]:
    """Tracked files that people read."""
    return [name for name in tree.tracked_files() if name.endswith(TEXT) and name != "LICENSE"]


def matches(pattern: str, names: list[str]) -> list[str]:
    """Places, as file:line, where a pattern matches."""
    found = []
    for name in names:
        text = (tree.ROOT / name).read_text(encoding="utf-8", errors="replace")
        found += [
            f"{name}:{n}: {line.strip()[:100]}"
            for n, line in enumerate(text.splitlines(), 1)
            if re.search(pattern, line)
        ]
    return found


def pins(name: str) -> dict[str, str]:
    """Distribution -> version of a requirements file."""
    lines = (line.split("#")[0].strip() for line in (tree.ROOT / name).read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what):
    assert matches(FORBIDDEN[what], text_files()) == []


@pytest.mark.parametrize("what", UNFINISHED)
def test_no_python_file_holds(what):
    assert matches(UNFINISHED[what], [name for name in text_files() if name.endswith(".py")]) == []


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a path of one machine", 'path = "/ho' + 'me/somebody/model.safetensors"'),
        ("a path of one machine", "cd /wo" + "rk/main"),
        ("the address of an index", "pip install --index-url https://py" + "pi.org/simple"),
        ("a conflict mark", "<" * 7 + " HEAD"),
    ],
)
def test_the_patterns_match_what_they_forbid(what, text):
    assert re.search(FORBIDDEN[what], text)


def test_every_requirement_is_pinned():
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert pins(name)
        assert all(re.fullmatch(r"[\w.]+", version) for version in pins(name).values())


def test_product_code_imports_only_what_is_pinned():
    allowed = {IMPORTED_AS.get(name, name) for name in pins("requirements.txt")} | OPTIONAL | set(PART_OF)
    wrong = {name: sorted(extra) for name in tree.product_files() if (extra := tree.third_party(name) - allowed)}
    assert wrong == {}


def test_tests_import_only_what_is_pinned():
    both = pins("requirements.txt") | pins("requirements-dev.txt")
    allowed = {IMPORTED_AS.get(name, name) for name in both} | {"tests", "xformers"}
    tests = [name for name in tree.tracked_files() if name.startswith("tests/") and name.endswith(".py")]
    wrong = {name: sorted(extra) for name in tests if (extra := tree.third_party(name) - allowed)}
    assert wrong == {}


def test_extras_and_development_pins_agree():
    project = tomllib.loads((tree.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = dict(one.split("==") for extra in project["optional-dependencies"].values() for one in extra)
    both = pins("requirements.txt") | pins("requirements-dev.txt")
    assert {name: version for name, version in extras.items() if name in both} == {
        name: both[name] for name in extras if name in both
    }


def test_code_is_formatted_and_linted():
    for command in (["format", "--check"], ["check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=tree.ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_pages_about_options_are_in_sync_with_the_options():
    command = [sys.executable, "-m", "library.config.render", "--check"]
    result = subprocess.run(command, cwd=tree.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_readme_opens_with_the_two_commands():
    opening = (tree.ROOT / "README.md").read_text(encoding="utf-8")[:900]
    assert 0 < opening.index("make demo") < opening.index("make test")


def test_links_between_pages_lead_somewhere():
    broken = []
    for name in [name for name in tree.tracked_files() if name.endswith(".md")]:
        page = tree.ROOT / name
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{name} -> {target}")
    assert broken == []


def test_changelog_and_licence_are_there():
    assert re.search(r"^## ", (tree.ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert "Apache License" in (tree.ROOT / "LICENSE").read_text(encoding="utf-8")[:300]


def test_continuous_integration_calls_make_test():
    script = tree.ROOT / ".ci" / "run"
    lines = [line.strip() for line in script.read_text(encoding="utf-8").splitlines()]
    assert lines[-1] == "make test"
    assert script.stat().st_mode & 0o111
