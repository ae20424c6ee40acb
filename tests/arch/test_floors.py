"""Imports go downward only, siblings stay strangers, and there are no cycles."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePosixPath

import pytest

from tests.arch import tree

# What each part may take from other people's packages. A new line here is a decision about the design.
TENSORS = {"torch", "numpy"}
THIRD_PARTY = {
    "library.config": {"pydantic", "pydantic_core", "toml"},
    "library.errors": set(),
    "library.log": {"tqdm"},
    "library.seeds": set(),
    "library.plugins": set(),
    "library.sizes": set(),
    "library.diffusion": TENSORS,
    "library.io": TENSORS | {"safetensors", "PIL", "cv2"},
    "library.models": TENSORS
    | {"safetensors", "diffusers", "transformers", "tokenizers", "huggingface_hub", "einops", "accelerate", "xformers"},
    "library.data": TENSORS | {"PIL", "cv2", "tqdm"},
    "networks": TENSORS | {"einops"},
}


def _outside(found: tree.Import, name: str) -> str | None:
    """Why an import is not allowed, or None when it is."""
    here, there = tree.place_of(tree.module_name(name)), tree.place_of(found.module)
    if here is None or there is None or here == there:
        return None
    if there[0] > here[0]:
        return f"{name}:{found.line} (floor {here[0]}) imports {found.module} (floor {there[0]}), which is above it"
    if there[0] == here[0]:
        return f"{name}:{found.line} imports {found.module}, its sibling on floor {here[0]}"
    return None


def test_every_module_of_the_library_is_on_a_floor():
    packages = {"library", ""}
    homeless = [
        name
        for name in tree.product_files()
        if name.startswith(("library/", "networks/"))
        and tree.module_name(name) not in packages
        and tree.place_of(tree.module_name(name)) is None
    ]
    assert homeless == []


def test_imports_go_downward_only():
    wrong = [
        text for name in tree.floor_files(0, 5) for found in tree.imports_of(name) if (text := _outside(found, name))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_entry_points_do_not_import_each_other():
    scripts = {tree.module_name(name) for name in tree.entry_points()}
    wrong = [
        f"{name}:{found.line} imports {found.module}"
        for name in tree.entry_points()
        for found in tree.imports_of(name)
        if found.module in scripts
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_product_code_imports_neither_tests_nor_benchmarks():
    wrong = [
        f"{name}:{found.line} imports {found.module}"
        for name in tree.floor_files(0, 5)
        for found in tree.imports_of(name)
        if found.module.split(".")[0] in ("tests", "benchmarks")
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_import_cycles_even_through_lazy_imports():
    known = tree.modules()
    graph = {
        module: {found.module for found in tree.imports_of(name) if found.module in known and found.module != module}
        for module, name in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("part", THIRD_PARTY)
def test_third_party_packages_stay_where_they_belong(part):
    wrong = {}
    for name in tree.floor_files(0, 2):
        module = tree.module_name(name)
        if module == part or module.startswith(part + "."):
            extra = tree.third_party(name) - THIRD_PARTY[part]
            if extra:
                wrong[name] = sorted(extra)
    assert wrong == {}


def test_package_files_hold_a_docstring_and_nothing_else():
    wrong = []
    for name in tree.product_files():
        if PurePosixPath(name).name == "__init__.py":
            body = tree.parse(name).body
            if len(body) != 1 or not (isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)):
                wrong.append(name)
    assert wrong == []


def test_folders_of_packages_have_a_package_file():
    folders = {
        PurePosixPath(name).parent for name in tree.product_files() if name.startswith(("library/", "networks/"))
    }
    missing = [folder.as_posix() for folder in sorted(folders) if f"{folder}/__init__.py" not in tree.tracked_files()]
    assert missing == []


@pytest.mark.parametrize(
    ("name", "module", "why"),
    [
        ("library/io/images.py", "library.models.bundle", "above"),
        ("library/config/cli.py", "library.io.atomic", "above"),
        ("library/data/dataset.py", "library.models.checkpoint", "sibling"),
        ("networks/lora.py", "library.data.types", "sibling"),
        ("library/diffusion/reduce.py", "library.io.atomic", "sibling"),
        ("library/inference/denoise.py", "library.training.step", "above"),
    ],
)
def test_the_rule_refuses(name, module, why):
    assert why in _outside(tree.Import(module, 1), name)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("library/data/dataset.py", "library.data.types"),
        ("library/training/launch.py", "library.models.bundle"),
        ("library/io/atomic.py", "library.errors"),
        ("library/models/checkpoint.py", "torch"),
    ],
)
def test_the_rule_allows(name, module):
    assert _outside(tree.Import(module, 1), name) is None
