"""`--help` and errors in the configuration come at once: no entry point imports a heavy library for them."""

import subprocess
import sys

import pytest

from tests.arch import tree

HEAVY = ("torch", "numpy", "diffusers", "transformers", "accelerate", "safetensors", "cv2", "PIL", "matplotlib", "peft")

# Runs one script as `python script --help` does, in an interpreter where the heavy libraries cannot be imported.
RUNNER = """
import runpy, sys
HEAVY = {heavy!r}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise AssertionError(f"--help imports {{name}}")

sys.meta_path.insert(0, Refuse())
sys.argv = [{script!r}, *{arguments!r}]
sys.path.insert(0, {folder!r})
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    loaded = sorted(set(HEAVY) & set(sys.modules))
    assert not loaded, f"--help loads {{loaded}}"
"""


def start(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Start an entry point in the guarded interpreter."""
    script = tree.ROOT / name
    code = RUNNER.format(heavy=HEAVY, script=str(script), arguments=list(arguments), folder=str(script.parent))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=tree.ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", tree.entry_points())
def test_help_comes_without_heavy_imports(name):
    result = start(name, "--help")
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()


@pytest.mark.parametrize(
    "name",
    [name for name in tree.entry_points() if name.startswith(("sdxl_", "prepare_", "tools/cache_", "tools/dataset_"))],
)
def test_an_unknown_option_is_refused_without_heavy_imports(name):
    files = ["folder", "in.json", "out.json", "tiny"] if name.startswith("prepare_") else []
    result = start(name, *files, "--no_such_option_at_all")
    assert result.returncode == 2, result.stderr
    assert "no_such_option_at_all" in result.stderr


def test_the_guard_sees_a_heavy_import(tmp_path):
    script = tmp_path / "heavy.py"
    script.write_text("import torch\n", encoding="utf-8")
    result = start(str(script))
    assert result.returncode != 0
    assert "--help imports torch" in result.stderr
