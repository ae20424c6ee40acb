"""The dataset file out of `ss_datasets`, the list of data sets in a network's metadata (model_files.md section 9)."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from library.config.data import DataOptions
from library.config.dataset_keys import DATASET_KEYS, OWN_KEYS, SUBSET_KEYS, SUBSET_ONLY_KEYS
from library.config.toml_file import toml_value

_RENAMED = {"batch_size_per_device": "batch_size"}
# What a data set came to, not what it was told.
_FACTS = frozenset({"is_dreambooth", "num_train_images", "num_reg_images", "tag_frequency", "bucket_info", "img_count"})
_BUCKETS = frozenset({"min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"})


def dataset_toml(text: str, notes: list[str]) -> str | None:
    """The dataset file as TOML; what has no key there is added to `notes`. None when `text` is no such list."""
    try:
        datasets = json.loads(text)
        assert isinstance(datasets, list) and all(isinstance(each, dict) for each in datasets)
    except (ValueError, AssertionError):
        notes.append("not mapped: datasets is no JSON list of tables")
        return None
    lines: list[str] = []
    for dataset in datasets:
        lines.append("[[datasets]]")
        left_out = frozenset() if dataset.get("enable_bucket") else _BUCKETS
        lines += _keys(dataset, DATASET_KEYS, "datasets", notes, skip=left_out | {"subsets"})
        if "resize_interpolation" in dataset and dataset["resize_interpolation"] is not None:
            lines.append(f"resize_interpolation = {toml_value(dataset['resize_interpolation'])}")
        for subset in dataset.get("subsets", []):
            lines += ["", "[[datasets.subsets]]"]
            lines += _keys(subset, SUBSET_KEYS, "subsets", notes, skip=frozenset())
        lines.append("")
    return "\n".join(lines)


def _keys(
    table: Mapping[str, Any], known: Mapping[str, str], kind: str, notes: list[str], *, skip: frozenset[str]
) -> list[str]:
    """Lines of one table; values that are defaults are left out."""
    defaults = DataOptions.options()
    lines = []
    for name, value in table.items():
        key = _RENAMED.get(name, name)
        if key in _FACTS or key in skip or value is None or (kind == "datasets" and key == "resize_interpolation"):
            continue
        own = kind == "subsets" and (key in SUBSET_ONLY_KEYS or key in OWN_KEYS)
        if key not in known and not own:
            if value not in (False, 0, "", [], {}):
                notes.append(f"not mapped: {kind}: {name} = {str(value)[:80]} has no key in the dataset file")
            continue
        if key == "resolution":
            value = ast.literal_eval(value) if isinstance(value, str) else value
        option = defaults.get(known.get(key, ""))
        if (value is False and own) or (option is not None and option.default == value and key != "batch_size"):
            continue
        lines.append(f"{key} = {toml_value(value)}")
    return lines
