"""Files that an option names have to be there before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path

from library.config.choices import CHECKPOINT_SUFFIXES, EMBEDDED_MODEL, NETWORK_PACKAGES, OTHER_NETWORKS, ROOT
from library.config.fields import FULL, LLLITE, NETWORK, TOKENS, TRAINER
from library.config.known_flags import nearest
from library.config.run_config import RunConfig
from library.config.tracker_file import tracker_problem
from library.errors import Problem
from library.plugins import list_plugins


def check_files(cfg: RunConfig, *, wrong: Collection[str] = ()) -> list[Problem]:
    """The problems with names of files, folders and modules; `wrong` names options that are reported already."""
    if cfg.run == "dataset_report":  # it opens what the dataset names, and no model
        return [problem for name in ("json_file", "html_file") for problem in _check_written(cfg, name)]
    draws = cfg.run == "sdxl_gen_img"
    names = ("ckpt", "vae", "clip_vision_model") if draws else ("pretrained_model_name_or_path", "vae")
    problems = [problem for name in names if name not in wrong for problem in _check_model(cfg, name)]
    if draws:
        problems += _check_existing(cfg, "from_file", kind="file")
        problems += _check_existing(cfg, "from_module", kind="file")
        problems += _check_existing(cfg, "wildcard_dir", kind="folder")
        problems += _check_output(cfg, "outdir")
        for name in ("guide_image_path", "control_net_models"):
            problems += _check_files_or_folders(cfg, name)
        many = ("network_module", "network_weights", "control_net_lllite_models", "textual_inversion_embeddings")
        for name in many:
            problems += [] if name in wrong else _check_many(cfg, name)
    elif cfg.run in TRAINER:
        own = {"network_weights": NETWORK | LLLITE, "unet_config": FULL, "token_file": TOKENS | NETWORK}
        own["token_template_file"] = own["token_file"]
        for name in (name for name, runs in own.items() if cfg.run in runs):
            problems += _check_existing(cfg, name, kind="file")
        if cfg.run in NETWORK and "base_weights" not in wrong:
            problems += _check_many(cfg, "base_weights")
        problems += _check_existing(cfg, "resume", kind="folder")
        problems += _check_prompts(cfg)
        problems += _check_output(cfg, "output_dir")
        problems += _check_trackers(cfg)
        if cfg.run in NETWORK and "network_module" not in wrong:
            problems += _check_network_module(cfg)
    return problems


def _check_model(cfg: RunConfig, name: str) -> Iterator[Problem]:
    """A name that can only be a local path has to exist; owner/name may be a hub id and is left to the loader."""
    value = cfg.get(name)
    if not value or value == EMBEDDED_MODEL or Path(value).exists() or _may_be_hub_id(value):
        return
    fix = _similar_file(Path(value)) or f"name an existing file or folder, a hub id (owner/name), or {EMBEDDED_MODEL}"
    yield Problem(f"{name} {value} does not exist", cfg.provenance[name], fix)


def _may_be_hub_id(value: str) -> bool:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value):
        return False
    return not value.endswith(CHECKPOINT_SUFFIXES) and not Path(value).parent.exists()


def _similar_file(path: Path) -> str:
    """A suggestion for a misspelt path: the first folder of it that is missing, or the nearest name beside it."""
    try:
        for parent in reversed(path.parents):
            if not parent.exists():
                return f"there is no folder {parent}"
        near = nearest(path.name, [other.name for other in path.parent.iterdir()])
    except OSError:
        return ""
    return f"did you mean {path.with_name(near)}?" if near else ""


def missing_path(value: str, *, name: str, kind: str, where: str) -> Problem | None:
    """The problem with a path that is not an existing file or folder, as `kind` says."""
    path = Path(value)
    if path.is_dir() if kind == "folder" else path.is_file():
        return None
    if path.exists():
        return Problem(f"{name} {value} is not a {kind}", where, f"name a {kind}")
    return Problem(f"{name} {value} does not exist", where, _similar_file(path) or f"name an existing {kind}")


def _check_existing(cfg: RunConfig, name: str, *, kind: str) -> list[Problem]:
    value = cfg.get(name)
    problem = missing_path(value, name=name, kind=kind, where=cfg.provenance[name]) if value else None
    return [problem] if problem else []


def _check_prompts(cfg: RunConfig) -> list[Problem]:
    value = cfg.preview.sample_prompts
    if value and Path(value).suffix.lower() not in (".txt", ".toml", ".json"):
        where = cfg.provenance["sample_prompts"]
        return [Problem(f"sample_prompts {value} is of no known kind", where, "name a .txt, .toml or .json file")]
    return _check_existing(cfg, "sample_prompts", kind="file")


def _check_output(cfg: RunConfig, name: str) -> Iterator[Problem]:
    """A folder for what is written may be missing, since it is made; a file in its place cannot be."""
    value = cfg.get(name)
    if value and Path(value).exists() and not Path(value).is_dir():
        yield Problem(f"{name} {value} is a file", cfg.provenance[name], "name a folder")


def _check_trackers(cfg: RunConfig) -> Iterator[Problem]:
    """wandb is no requirement: it comes with fifteen packages."""
    if cfg.loop.log_with in ("wandb", "all") and find_spec("wandb") is None:
        yield Problem(
            f"log_with {cfg.loop.log_with} needs wandb, which is not installed",
            cfg.provenance["log_with"],
            "pip install wandb==0.31.0",
        )
    problem = None
    if cfg.loop.log_tracker_config:
        problem = tracker_problem(cfg.loop.log_tracker_config, where=cfg.provenance["log_tracker_config"])
    if problem is not None:
        yield problem


def _check_written(cfg: RunConfig, name: str) -> Iterator[Problem]:
    value = cfg.get(name)
    if value and Path(value).is_dir():
        yield Problem(f"{name} {value} is a folder", cfg.provenance[name], "name a file in it")


def _check_network_module(cfg: RunConfig) -> list[Problem]:
    value = cfg.network.network_module
    if not value:
        return [Problem("network_module is missing", fix="set network_module = networks.lora")]
    problem = network_problem(value, where=cfg.provenance["network_module"])
    return [problem] if problem else []


def _check_files_or_folders(cfg: RunConfig, name: str) -> Iterator[Problem]:
    """Control images come one by one or by the folder, ControlNets as single files or as diffusers folders."""
    for value in cfg.get(name):
        kind = "folder" if Path(value).is_dir() else "file"
        problem = missing_path(value, name=name, kind=kind, where=cfg.provenance[name])
        if problem:
            yield problem


def _check_many(cfg: RunConfig, name: str) -> Iterator[Problem]:
    where = cfg.provenance[name]
    for value in cfg.get(name):
        if name == "network_module":
            problem = network_problem(value, where=where)
        else:
            problem = missing_path(value, name=name, kind="file", where=where)
        if problem:
            yield problem


def network_problem(value: str, *, where: str) -> Problem | None:
    """The problem with a network module that cannot be there; nothing is imported to find out."""
    own = list_plugins(ROOT / "networks")
    package, _, name = value.rpartition(".")
    if package in ("", "networks"):
        if name in OTHER_NETWORKS:
            return Problem(f"network_module {value} changes no weights, as a LoRA does", where, OTHER_NETWORKS[name])
        if name in own:
            return None
        available = f"available: {', '.join(f'networks.{plugin}' for plugin in own if plugin not in OTHER_NETWORKS)}"
        near = nearest(name, own)
        hint = f"did you mean networks.{near}? " if near else ""
        return Problem(f"network_module {value} does not exist", where, hint + available)
    top = value.split(".")[0]
    try:
        found = find_spec(top)
    except (ImportError, ValueError):
        found = None
    if found is None:
        package = f"pip install {NETWORK_PACKAGES[top]}" if top in NETWORK_PACKAGES else f"install the package {top}"
        fix = f"{package}, or check the spelling; own modules are looked up on PYTHONPATH"
        return Problem(f"network_module {value} cannot be found", where, fix)
    return None
