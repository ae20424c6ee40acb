"""Where a subset's images and their masks come from: folders, or a metadata file; and which keys go with which."""

from __future__ import annotations

from pathlib import Path

from library.config.check_files import missing_path
from library.config.dataset_keys import Place
from library.errors import Problem

FOLDERS_ONLY = ("is_reg", "class_tokens", "caption_extension")
"""Keys that say something about a folder of images with caption files, and nothing about a metadata file."""


def check_source(place: Place) -> list[Problem]:
    """The problems of one subset: it names an image folder or a metadata file, and what it names is there."""
    where = place.file.where(*place.path)
    named = {key: kind for key, kind in (("image_dir", "folder"), ("metadata_file", "file")) if key in place.values}
    if not named:
        if {"image_dir", "metadata_file"} & place.wrong:
            return []
        return [Problem(f"{place.title} has no image_dir", where, "name its folder of images, or a metadata_file")]
    problems = [
        missing_path(place.values[key], name=key, kind=kind, where=place.where(key)) for key, kind in named.items()
    ]
    found = [problem for problem in problems if problem]
    if "metadata_file" in named:
        found += [
            Problem(f"{key} cannot act in a subset with metadata_file", place.where(key), f"remove {key}")
            for key in FOLDERS_ONLY
            if place.values.get(key)
        ]
    if place.values.get("is_reg") and place.values.get("is_validation"):
        fix = "regularisation images are there to be trained on: remove one of the two"
        found.append(Problem("is_reg and is_validation exclude each other", place.where("is_validation"), fix))
    return found + _check_companions(place)


def _check_companions(place: Place) -> list[Problem]:
    """The problems of a subset's folder of masks or condition images."""
    name = place.values.get("conditioning_data_dir")
    if name is None:
        return []
    where = place.where("conditioning_data_dir")
    missing = missing_path(name, name="conditioning_data_dir", kind="folder", where=where)
    if missing:
        return [missing]
    image_dir = place.values.get("image_dir")
    if image_dir and Path(image_dir).is_dir() and Path(name).samefile(image_dir):
        fix = "name the folder that holds a mask or a condition image for each image"
        return [Problem("conditioning_data_dir is the folder of the images themselves", where, fix)]
    return []


def check_kinds(places: list[Place]) -> list[Problem]:
    """All subsets of one dataset have a metadata file, or none has."""
    named = [place for place in places if "metadata_file" in place.values]
    if not named or len(named) == len(places):
        return []
    fix = "put the subsets with metadata_file into a [[datasets]] of their own"
    where = named[0].where("metadata_file")
    return [Problem("a dataset has subsets with metadata_file and subsets without", where, fix)]
