"""The dataset of a run: [general] / [[datasets]] / [[datasets.subsets]], or DreamBooth folder names.

A value is looked up in the subset, its dataset, [general], the run's options, in this order; the first one that is
there counts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.config.check_files import missing_path
from library.config.dataset_keys import DATASET_KEYS, SUBSET_KEYS, Place, read_dataset_tables
from library.config.dataset_rules import align_buckets, check_dataset
from library.config.dataset_spec import DatasetSpec, SubsetSpec
from library.config.run_config import RunConfig
from library.errors import Problem, UserError


def dataset_specs(cfg: RunConfig) -> list[DatasetSpec]:
    """The datasets of a run, from dataset_config or from the folder names in train_data_dir. Raises UserError."""
    specs, problems, _ = read_datasets(cfg)
    if problems:
        raise UserError.from_problems(problems)
    return specs


def read_datasets(cfg: RunConfig, *, wrong: Collection[str] = ()) -> tuple[list[DatasetSpec], list[Problem], list[str]]:
    """The datasets that can be read, the problems of the others, and notices about what was adjusted.

    `wrong` names options whose values are reported already: rules that need them are left out.
    """
    reader = _Reader(cfg, are_rules_checked=not set(wrong) & {*DATASET_KEYS.values(), *SUBSET_KEYS.values()})
    try:
        if cfg.data.dataset_config:
            reader.read_file(cfg.data.dataset_config)
        elif cfg.data.train_data_dir:
            reader.read_folders(cfg.data.train_data_dir)
    except UserError as error:
        reader.problems += error.problems
    return reader.specs, reader.problems, reader.notices


@dataclass
class _Reader:
    """Collects datasets, problems and notices on the way through a file or a folder."""

    cfg: RunConfig
    are_rules_checked: bool = True
    specs: list[DatasetSpec] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def read_file(self, name: str) -> None:
        where = self.cfg.provenance["dataset_config"]
        missing = missing_path(name, name="dataset_config", kind="file", where=where)
        if missing:
            self.problems.append(missing)
            return
        tables = read_dataset_tables(Path(name))
        self.problems += tables.problems
        if not tables.datasets and not tables.problems:
            fix = "add [[datasets]] and, below it, [[datasets.subsets]] with an image_dir"
            self.problems.append(Problem("the dataset file names no dataset", name, fix))
        for dataset, subset_places in tables.datasets:
            subsets = self._subsets(subset_places, [dataset, tables.general])
            self._add([dataset, tables.general], subsets, where=dataset.file.where(*dataset.path))

    def read_folders(self, name: str) -> None:
        """Sub-folders named like 10_cat: repeats, then class words; in the order of their names."""
        where = self.cfg.provenance["train_data_dir"]
        missing = missing_path(name, name="train_data_dir", kind="folder", where=where)
        if missing:
            self.problems.append(missing)
            return
        subsets = []
        for folder in sorted(path for path in Path(name).iterdir() if path.is_dir()):
            repeats, class_tokens = folder_name(folder.name)
            if repeats is None:
                self.notices.append(f"{folder} is ignored: its name does not start with a number of repeats and _")
            elif repeats < 1:
                self.notices.append(f"{folder} is ignored: its number of repeats is below 1")
            else:
                subsets.append(self._subset([], str(folder), num_repeats=repeats, class_tokens=class_tokens))
        if not subsets:
            fix = "put the images into a folder inside it that is named by repeats and class words, such as 10_cat"
            self.problems.append(Problem(f"train_data_dir {name} holds no folder such as 10_cat", where, fix))
            return
        self._add([], subsets, where=where)

    def _subsets(self, places: list[Place], outer: list[Place]) -> list[SubsetSpec]:
        subsets: list[SubsetSpec] = []
        for place in places:
            where = place.file.where(*place.path)
            image_dir = place.values.get("image_dir")
            if image_dir is None:
                if "image_dir" not in place.wrong:
                    self.problems.append(Problem(f"{place.title} has no image_dir", where, "name its folder of images"))
                continue
            missing = missing_path(image_dir, name="image_dir", kind="folder", where=place.where("image_dir"))
            if missing:
                self.problems.append(missing)
                continue
            spec = self._subset([place, *outer], image_dir)
            if spec.num_repeats < 1:
                self.notices.append(f"{image_dir} is ignored: its num_repeats is below 1 ({where})")
            elif any(Path(other.image_dir) == Path(image_dir) for other in subsets):
                self.notices.append(f"{image_dir} is named twice in one dataset: the second time is ignored ({where})")
            else:
                subsets.append(spec)
        return subsets

    def _subset(self, places: list[Place], image_dir: str, **fixed: Any) -> SubsetSpec:
        values = {key: self._look_up(places, key, option) for key, option in SUBSET_KEYS.items()}
        for key in ("class_tokens", "custom_attributes"):
            found = [place.values[key] for place in places if key in place.values]
            values |= {key: found[0]} if found else {}
        return SubsetSpec(image_dir=image_dir, **{**values, **fixed})

    def _look_up(self, places: list[Place], key: str, option: str) -> Any:
        for place in places:
            if place.values.get(key) is not None:
                return place.values[key]
        return self.cfg.get(option)

    def _add(self, places: list[Place], subsets: list[SubsetSpec], *, where: str) -> None:
        """Add a dataset after its rules have been checked."""
        values = {key: self._look_up(places, key, option) for key, option in DATASET_KEYS.items()}
        if not self.are_rules_checked or any("resolution" in place.wrong for place in places):
            return
        if values["resolution"] is None:
            fix = "set resolution, for example resolution = 1024"
            problem = Problem("the dataset has no resolution", where, fix)
            self.problems += [problem] if problem not in self.problems else []
            return
        if not subsets:
            if not self.problems:
                fix = "add [[datasets.subsets]] with an image_dir"
                self.problems.append(Problem("the dataset has no subset with images", where, fix))
            return
        spec, told = align_buckets(DatasetSpec(subsets=tuple(subsets), **values), where=where)
        self.notices += told
        self.problems += check_dataset(self.cfg, spec, where=where)
        self.specs.append(spec)


def folder_name(name: str) -> tuple[int | None, str]:
    """(repeats, class words) of a folder name such as "10_cat"; repeats None when it starts with no number."""
    number, _, class_tokens = name.partition("_")
    try:
        return int(number), class_tokens
    except ValueError:
        return None, ""
