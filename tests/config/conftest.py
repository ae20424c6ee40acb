"""A complete set of options, and short ways to run them through the configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.config.cli import make_config, parse
from library.config.run_config import RunConfig
from library.config.runs import RUNS
from library.errors import Problem, UserError


@pytest.fixture
def complete(tmp_path: Path) -> dict[str, Any]:
    """The fewest options with which sdxl_train_network starts."""
    (tmp_path / "images" / "2_cat").mkdir(parents=True)
    return {
        "pretrained_model_name_or_path": "tiny",
        "train_data_dir": str(tmp_path / "images"),
        "resolution": 512,
        "network_module": "networks.lora",
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def toml_text(complete: dict[str, Any]) -> str:
    """The same as five lines of TOML."""
    return "".join(f"{name} = {value!r}\n" for name, value in complete.items())


@pytest.fixture
def run_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """Parse run.toml with the given text, and further arguments."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *argv: str, run: str = "sdxl_train_network") -> RunConfig:
        Path("run.toml").write_text(text, encoding="utf-8")
        return parse(run, ["--config_file", "run.toml", *argv])

    return run


@pytest.fixture
def problems_of(complete: dict[str, Any]) -> Callable[..., tuple[Problem, ...]]:
    """The problems of the complete options with some of them changed."""

    def problems(run: str = "sdxl_train_network", **changes: Any) -> tuple[Problem, ...]:
        try:
            own = {name: value for name, value in complete.items() if name in RUNS[run].options()}
            make_config(run, **{**own, **changes})
        except UserError as error:
            return error.problems
        return ()

    return problems
