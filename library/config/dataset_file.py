"""The dataset of a run: [general] / [[datasets]] / [[datasets.subsets]], a metadata file, or DreamBooth folder names.

A value is looked up in the subset, its dataset, [general], the run's options, in this order; the first one that is
there counts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.config.check_files import missing_path
from library.config.dataset_keys import DATASET_KEYS, SUBSET_KEYS, SUBSET_ONLY_KEYS, Place, read_dataset_tables
from library.config.dataset_resolutions import KEYS as RESOLUTION_KEYS
from library.config.dataset_resolutions import look_up_resolutions
from library.config.dataset_rules import align_buckets, check_all, check_dataset, idle_variants, leave_faces_to_buckets
from library.config.dataset_sources import check_kinds, check_source
from library.config.dataset_spec import DatasetSpec, SubsetSpec
from library.config.fields import LLLITE
from library.config.run_config import RunConfig
from library.errors import Problem, UserError

_READ_OPTIONS = {*DATASET_KEYS.values(), *SUBSET_KEYS.values(), "masked_loss", "conditioning_data_dir"}


def dataset_specs(cfg: RunConfig) -> list[DatasetSpec]:
    """The datasets of a run, from dataset_config, in_json or the folder names in train_data_dir. Raises UserError."""
    specs, problems, _ = read_datasets(cfg)
    if problems:
        raise UserError.from_problems(problems)
    return specs


def read_datasets(cfg: RunConfig, *, wrong: Collection[str] = ()) -> tuple[list[DatasetSpec], list[Problem], list[str]]:
    """The datasets that can be read, the problems of the others, and notices about what was adjusted.

    `wrong` names options whose values are reported already: rules that need them are left out.
    """
    reader = _Reader(cfg, are_rules_checked=not set(wrong) & _READ_OPTIONS)
    try:
        if cfg.data.dataset_config:
            reader.read_file(cfg.data.dataset_config)
        elif cfg.data.in_json:
            reader.read_metadata(cfg.data.in_json)
        elif cfg.data.train_data_dir:
            reader.read_folders()
    except UserError as error:
        reader.problems += error.problems
    if not reader.problems and reader.are_rules_checked:
        reader.problems += check_all(cfg, reader.specs)
    return reader.specs, reader.problems, [*reader.notices, *idle_variants(cfg, reader.specs)]


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
        self.notices += tables.notices
        if not tables.datasets and not tables.problems:
            fix = "add [[datasets]] and, below it, [[datasets.subsets]] with an image_dir"
            self.problems.append(Problem("the dataset file names no dataset", name, fix))
        for dataset, subset_places in tables.datasets:
            subsets = self._subsets(subset_places, [dataset, tables.general])
            self._add([dataset, tables.general], subsets, where=dataset.file.where(*dataset.path))

    def read_metadata(self, name: str) -> None:
        """One metadata file; train_data_dir is where its relative names start."""
        if self._all_there(in_json="file", train_data_dir="folder", conditioning_data_dir="folder"):
            named = {"metadata_file": name, "control_dir": conditions_of(self.cfg)}
            subset = self._subset([], self.cfg.data.train_data_dir or "", **named)
            self._add([], [subset], where=self.cfg.provenance["in_json"])

    def _all_there(self, **kinds: str) -> bool:
        """Whether the files and folders that options name exist; notes a problem for each that does not."""
        known = self.cfg.flat()
        found = [
            missing_path(known[option], name=option, kind=kind, where=self.cfg.provenance[option])
            for option, kind in kinds.items()
            if known.get(option)
        ]
        self.problems += [problem for problem in found if problem]
        return not any(found)

    def read_folders(self) -> None:
        """The folders in train_data_dir and reg_data_dir as one dataset; or, beside the folder of their condition
        images, the images in train_data_dir itself."""
        if conditions_of(self.cfg) is not None or self.cfg.run in LLLITE:
            self._read_conditioned()
            return
        subsets = self._folders("train_data_dir", is_reg=False)
        if self.cfg.data.reg_data_dir:
            subsets += self._folders("reg_data_dir", is_reg=True)
        if not self.problems:
            self._add([], subsets, where=self.cfg.provenance["train_data_dir"])

    def _read_conditioned(self) -> None:
        """The images in train_data_dir with those in conditioning_data_dir. Source: dataset_config.md section 7."""
        if self._all_there(train_data_dir="folder", conditioning_data_dir="folder"):
            subset = self._subset([], self.cfg.data.train_data_dir or "", control_dir=conditions_of(self.cfg))
            self._add([], [subset], where=self.cfg.provenance["train_data_dir"])

    def _folders(self, option: str, *, is_reg: bool) -> list[SubsetSpec]:
        """Sub-folders named like 10_cat: repeats, then class words; in the order of their names."""
        where = self.cfg.provenance[option]
        name = self.cfg.get(option)
        missing = missing_path(name, name=option, kind="folder", where=where)
        if missing:
            self.problems.append(missing)
            return []
        subsets = []
        found = (path for path in Path(name).iterdir() if path.is_dir() and not path.name.startswith("."))
        for folder in sorted(found):
            repeats, class_tokens = folder_name(folder.name)
            if repeats is None:
                self.notices.append(f"{folder} is ignored: its name does not start with a number of repeats and _")
            elif repeats < 1:
                self.notices.append(f"{folder} is ignored: its number of repeats is below 1")
            else:
                fixed = {"num_repeats": repeats, "class_tokens": class_tokens, "is_reg": is_reg}
                subsets.append(self._subset([], str(folder), **fixed))
        if not subsets:
            fix = "put the images into a folder inside it that is named by repeats and class words, such as 10_cat"
            self.problems.append(Problem(f"{option} {name} holds no folder such as 10_cat", where, fix))
        return subsets

    def _subsets(self, places: list[Place], outer: list[Place]) -> list[SubsetSpec]:
        self.problems += check_kinds(places)
        subsets: list[SubsetSpec] = []
        for place in places:
            where = place.file.where(*place.path)
            wrong = check_source(place)
            self.problems += wrong
            if wrong or SUBSET_ONLY_KEYS.keys() & place.wrong:
                continue
            own: dict[str, Any] = {
                key: place.values[key] for key in ("metadata_file", "is_reg", "is_validation") if key in place.values
            }
            own |= self._companions(place)
            spec = self._subset([place, *outer], place.values.get("image_dir", ""), **own)
            if spec.num_repeats < 1:
                self.notices.append(f"{spec.place} is ignored: its num_repeats is below 1 ({where})")
            elif any(_is_again(spec, other) for other in subsets):
                self.notices.append(f"{spec.place} is named twice in one dataset: the second time is ignored ({where})")
            else:
                subsets.append(spec)
        return subsets

    def _companions(self, place: Place) -> dict[str, Any]:
        """What conditioning_data_dir holds: masks with masked_loss, else condition images."""
        if "conditioning_data_dir" not in place.values:
            return {}
        key = "mask_dir" if self.cfg.data.masked_loss else "control_dir"
        found: dict[str, Any] = {key: place.values["conditioning_data_dir"]}
        if key == "mask_dir":
            found["alpha_mask"] = False
            if place.values.get("alpha_mask"):
                what = "alpha_mask and conditioning_data_dir name two masks for each image"
                self.problems.append(Problem(what, place.where("alpha_mask"), "keep one of them"))
        return found

    def _subset(self, places: list[Place], image_dir: str, **fixed: Any) -> SubsetSpec:
        values = {key: self._look_up(places, key, option) for key, option in SUBSET_KEYS.items()}
        if fixed.get("is_reg"):
            values["loss_weight"] = self.cfg.data.prior_loss_weight
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
        if not self.are_rules_checked or any(place.wrong & set(RESOLUTION_KEYS) for place in places):
            return
        found, wrong = look_up_resolutions(self.cfg, places, where=where)
        if wrong:
            self.problems += [problem for problem in wrong if problem not in self.problems]
            return
        if not found.sizes:
            fix = "set resolution, for example resolution = 1024"
            problem = Problem("the dataset has no resolution", where, fix)
            self.problems += [problem] if problem not in self.problems else []
            return
        if not subsets:
            if not self.problems:
                fix = "add [[datasets.subsets]] with an image_dir"
                self.problems.append(Problem("the dataset has no subset with images", where, fix))
            return
        values = {
            key: self._look_up(places, key, option)
            for key, option in DATASET_KEYS.items()
            if key not in RESOLUTION_KEYS
        }
        spec = DatasetSpec(
            subsets=tuple(subsets),
            resolution=found.sizes[0],
            other_resolutions=found.sizes[1:],
            resolution_weights=found.weights,
            **values,
        )
        for adjust in (align_buckets, leave_faces_to_buckets):
            spec, told = adjust(spec, where=where)
            self.notices += told
        self.problems += check_dataset(self.cfg, spec, where=where)
        self.specs.append(spec)


def conditions_of(cfg: RunConfig) -> str | None:
    """The folder of condition images that the options name."""
    return cfg.lllite.conditioning_data_dir if "lllite" in cfg.groups else None


def _is_again(spec: SubsetSpec, other: SubsetSpec) -> bool:
    """Whether two subsets are one: the same images, for the same purpose, with the same masks or condition images."""
    same_use = (spec.mask_dir, spec.control_dir, spec.is_validation) == (
        other.mask_dir,
        other.control_dir,
        other.is_validation,
    )
    return same_use and Path(spec.place) == Path(other.place)


def folder_name(name: str) -> tuple[int | None, str]:
    """(repeats, class words) of a folder name such as "10_cat"; repeats None when it starts with no number."""
    number, _, class_tokens = name.partition("_")
    try:
        return int(number), class_tokens
    except ValueError:
        return None, ""
