"""Rebuild a run's configuration from the ss_ metadata of the network that it trained, ours or sd-scripts'.

Every value there is a text: "None", "True", "(1024, 1024)", JSON, or `module.Class(key=value,...)` for the optimizer
(model_files.md section 9). What the metadata do not say, or say in a way that has no option, is listed, never guessed.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from library.config.choices import OPTIMIZERS
from library.config.effective import option_toml
from library.config.fields import Option
from library.config.metadata_datasets import dataset_toml
from library.config.run_config import RunConfig
from library.config.runs import RUNS
from library.config.validate import check_rules
from library.config.values import Given, build_config
from library.errors import UserError

RUN = "sdxl_train_network"

# Keys that have another name, or whose option has.
_RENAMED = {
    "debiased_estimation": "debiased_estimation_loss",
    "batch_size_per_device": "train_batch_size",
    "sd_model_name": "pretrained_model_name_or_path",
    "vae_name": "vae",
}
# What a run was and not what it was told: there is nothing to set.
_FACTS = frozenset(
    [
        "session_id",
        "training_started_at",
        "training_finished_at",
        "num_train_images",
        "num_validation_images",
        "num_reg_images",
        "num_batches_per_epoch",
        "num_epochs",
        "steps",
        "epoch",
        "sd_model_hash",
        "new_sd_model_hash",
        "vae_hash",
        "new_vae_hash",
        "tag_frequency",
        "bucket_info",
        "total_batch_size",
        "sd_scripts_commit_hash",
        "v2",
        "base_model_version",
        "optimizer",
        "network_args",
        "dataset_dirs",
        "reg_dataset_dirs",
        "datasets",
        "text_encoder_lr",
    ]
)
_MODELSPEC = (
    "title", "author", "description", "license", "tags", "usage_hint", "trigger_phrase", "preprocessor",
    "is_negative_embedding",
)  # fmt: skip
_PREDICTIONS: dict[str, dict[str, Any]] = {
    "v": {"v_parameterization": True},
    "rectified_flow": {"prediction_type": "rectified_flow"},
}
_NOT_RECORDED = "caption_extension, save_*, sample_*, logging and most lr_scheduler_* options are not recorded"


@dataclass
class Rebuilt:
    """The texts of run.toml and, for a run with a dataset file, of that; notes: what could not be mapped, and why."""

    config: str
    dataset: str | None
    notes: list[str] = field(default_factory=list)


def rebuild(metadata: Mapping[str, str], *, dataset_file: str, where: str) -> Rebuilt:
    """A configuration out of a network's header texts; `dataset_file` is the name that it gives its dataset file.

    Values equal to the defaults are left out. Raises UserError when the file has no training metadata, or those of a
    model that is no SDXL.
    """
    said = {key.removeprefix("ss_"): value for key, value in metadata.items() if key.startswith("ss_")}
    if not set(said) - {"base_model_version", "v2"}:
        raise UserError(
            "the file says nothing about its training (no ss_ metadata)", where, "choose a file saved by a trainer"
        )
    version = said.get("base_model_version", "sdxl")
    if "sdxl" not in version or said.get("v2") == "True":
        raise UserError(f"it was trained on {version}, not on SDXL", where, "choose a network for SDXL")
    notes: list[str] = []
    values = dict(_plain(said, notes)) | dict(_optimizer(said, notes)) | _network(said, notes) | _rates(said, notes)
    values |= _modelspec(metadata)
    dataset = None
    if _set(said, "datasets"):
        dataset = dataset_toml(said["datasets"], notes)
        values["dataset_config"] = dataset_file
    else:
        values |= _folders(said, notes)
    config = _toml(values, notes)
    notes.append(_NOT_RECORDED)
    notes.append("names of files and folders are recorded without what stands before them: complete the paths")
    notes = ["".join(each if each.isprintable() else "?" for each in note) for note in notes]
    head = "".join(f"# {note}\n" for note in notes)
    return Rebuilt(head + config, dataset, notes)


def _set(said: Mapping[str, str], key: str) -> bool:
    return said.get(key, "None") not in ("None", "", "{}", "[]")


def _plain(said: Mapping[str, str], notes: list[str]) -> Iterator[tuple[str, Any]]:
    """Options that are recorded under their own name, or nearly so."""
    options = RUNS[RUN].options()
    for key, text in said.items():
        if key in _FACTS or text == "None":
            continue
        option = options.get(_RENAMED.get(key, key))
        if option is None:
            if text not in ("False", "0", "0.0", ""):
                notes.append(f"not mapped: {key} = {text[:80]} has no option here")
            continue
        try:
            yield option.name, _value(option, text)
        except (ValueError, SyntaxError):
            notes.append(f"not mapped: {key} = {text[:80]} is not a value of {option.name}")


def _value(option: Option, text: str) -> Any:
    """The typed value of a text, as it stands in TOML. Raises ValueError or SyntaxError."""
    if option.kind == "bool":
        if text not in ("True", "False"):
            raise ValueError(text)
        return text == "True"
    if option.kind in ("size", "span"):
        numbers = ast.literal_eval(text)
        return ",".join(str(each) for each in numbers) if isinstance(numbers, tuple | list) else str(numbers)
    if option.kind in ("int", "float", "share") and not option.many:
        number = ast.literal_eval(text)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(text)
        return int(number) if option.kind == "int" and number == int(number) else number
    if option.many:
        found = ast.literal_eval(text)
        return list(found) if isinstance(found, tuple | list) else [found]
    return text


def _optimizer(said: Mapping[str, str], notes: list[str]) -> Iterator[tuple[str, Any]]:
    """optimizer_type and optimizer_args of `module.Class(key=value,...)`."""
    if not _set(said, "optimizer"):
        return
    path, bracket, rest = said["optimizer"].partition("(")
    name = path.rpartition(".")[2]
    known = {each.lower(): each for each in OPTIMIZERS}
    yield "optimizer_type", known.get(name.lower(), path)
    if name == "SGD":  # as sd-scripts makes it of SGDNesterov
        notes.append("optimizer: SGD is also what SGDNesterov and SGDNesterov8bit are recorded as")
    if bracket:
        pairs = split_arguments(rest.removesuffix(")"))
        yield "optimizer_args", [pair for pair in pairs if "=" in pair]
        notes += [f"not mapped: {pair} of the optimizer is no key=value" for pair in pairs if "=" not in pair]


def split_arguments(text: str) -> list[str]:
    """`a=1,b=(0.9, 0.99)` at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _network(said: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    """network_args; sd-scripts writes the neuron dropout among them, which has an option of its own."""
    if not _set(said, "network_args"):
        return {}
    try:
        found = json.loads(said["network_args"])
        pairs = {key: value for key, value in found.items() if value is not None and str(value) != "None"}
    except (ValueError, AttributeError):
        notes.append(f"not mapped: network_args = {said['network_args'][:80]} is no table")
        return {}
    if str(pairs.get("dropout")) == said.get("network_dropout"):
        del pairs["dropout"]
    return {"network_args": [f"{key}={value}" for key, value in pairs.items()]} if pairs else {}


def _rates(said: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    if not _set(said, "text_encoder_lr"):
        return {}
    try:
        found = ast.literal_eval(said["text_encoder_lr"])
    except (ValueError, SyntaxError):
        notes.append(f"not mapped: text_encoder_lr = {said['text_encoder_lr'][:80]} is no number")
        return {}
    return {"text_encoder_lr": list(found) if isinstance(found, tuple | list) else [found]}


def _modelspec(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What modelspec entries tell: the prediction type, and the texts that a user fills in."""
    found: dict[str, Any] = {}
    for name in _MODELSPEC:
        text = metadata.get(f"modelspec.{name}")
        # The title is the output name unless one was given.
        if text and not (name == "title" and (text == metadata.get("ss_output_name") or "@" in text)):
            found[f"metadata_{name}"] = text
    return found | _PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""), {})


def _folders(said: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    """Folders of images of a run without a dataset file: known by their last names only."""
    values = {}
    for key, option in (("dataset_dirs", "train_data_dir"), ("reg_dataset_dirs", "reg_data_dir")):
        if not _set(said, key):
            continue
        try:
            names = list(json.loads(said[key]))
        except ValueError:
            notes.append(f"not mapped: {key} is no JSON")
            continue
        if names:
            values[option] = f"folder-of-{names[0]}"
            notes.append(f"{option}: name the folder that holds {', '.join(names)}")
    return values


def _toml(values: Mapping[str, Any], notes: list[str]) -> str:
    """Sections of options; values that validation refuses are noted instead, rules that they break are told."""
    run = RUNS[RUN]
    given = {name: Given(value, "metadata") for name, value in values.items() if value is not None}
    _, wrong = build_config(run, given)
    for name, problems in wrong.items():
        notes += [f"not mapped: {problem.what}" for problem in problems]
        del given[name]
    cfg, _ = build_config(run, given)
    given = {name: each for name, each in given.items() if cfg.get(name) != run.options()[name].default}
    cfg, _ = build_config(run, given)
    notes += [f"to be settled: {problem.what}" for problem in check_rules(cfg) if _is_about(problem.what, cfg)]
    lines: list[str] = []
    for key, group in run.groups.items():
        found = [
            f"{name} = {option_toml(details, cfg.get(name))}"
            for name, details in group.options().items()
            if name in given
        ]
        lines += [f"[{key}]", *found, ""] if found else []
    return "\n".join(lines)


def _is_about(sentence: str, cfg: RunConfig) -> bool:
    """Whether a problem names an option that was rebuilt; what is simply not given yet is no problem here."""
    return any(name in sentence for name in RUNS[RUN].options() if cfg.is_given(name))
