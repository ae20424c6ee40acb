"""The images of one folder, with captions from text files beside them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from library.config.dataset_file import SubsetSpec
from library.data.dataset_index import DatasetIndex, Table
from library.data.file_facts import caption_texts, image_sizes
from library.data.folder_listing import Listing, list_folder, prefix_of
from library.data.records import FileStamp, ImageRecord, ScanReport, Skipped
from library.errors import UserError
from library.io.images import IMAGE_EXTENSIONS
from library.sizes import Size

STEM_PIECES_WITH_FACE = 5
"""A stem of at least this many "_"-pieces may end in four numbers of a face box, which the caption file leaves out."""


def scan(
    subset: SubsetSpec, *, report: ScanReport, cache_dir: Path | None = None, use_index: bool = True
) -> Iterator[ImageRecord]:
    """The readable images of `subset.image_dir`, sorted by name, sub-folders not entered.

    Image sizes and captions come from the folder's index (in the folder, or below `cache_dir`) as far as it knows
    the files as they are now; the index is brought up to date. An image whose header cannot be read or whose caption
    is not UTF-8 is left out and listed in `report`, as is a link that leads nowhere; one without a caption file
    trains with the class tokens, or else with an empty caption and is listed too. Raises UserError when the folder
    is missing or holds no image.
    """
    folder = Path(subset.image_dir)
    listing, images = _list_images(folder)
    index = DatasetIndex(folder, cache_dir=cache_dir, enabled=use_index)
    sizes = image_sizes(folder, images, index=index, listed=listing.files)
    files = caption_files(images, listing.files, extension=subset.caption_extension)
    captions = caption_texts(folder, list(dict.fromkeys(filter(None, files))), index=index, listed=listing.files)
    index.save()
    path_of, key_of = prefix_of(folder), f"{folder.name}/"
    report.skipped += [Skipped(path_of + name, "the link leads to no file") for name in listing.broken_images]
    problem_of = _problems(images, files, of_images=sizes.problems, of_captions=captions.problems)
    repeats, weight = subset.num_repeats, subset.loss_weight
    for name, lines, size, stamp in zip(images, _lines(files, captions.table), *_facts(sizes.table), strict=True):
        path = path_of + name
        if name in problem_of:
            report.skipped.append(Skipped(path, problem_of[name]))
            continue
        if lines is None:
            caption = subset.class_tokens
            if caption is None:
                report.missing_captions.append(path)
        else:
            caption = lines if subset.enable_wildcard else lines.partition("\n")[0]
        yield ImageRecord(key_of + name, path, size, caption or "", subset, repeats, weight, stamp=stamp)


def _lines(files: list[str | None], captions: Table) -> Sequence[str | None]:
    """What each image's caption file says; None for an image without one."""
    if files == captions.names:
        return captions.texts
    lines_of = dict(zip(captions.names, captions.texts, strict=True))
    return [None if file is None else lines_of[file] for file in files]


def _facts(images: Table) -> tuple[Iterator[Size], Iterator[FileStamp]]:
    return map(Size, *images.sizes.T.tolist()), map(FileStamp, *images.stamps.T.tolist())


def caption_files(images: Sequence[str], files: Collection[str], *, extension: str) -> list[str | None]:
    """The caption file of each image, by name; None where there is none among `files`.

    That is `<stem><extension>`, else, for a stem that ends in four face-box numbers, the stem without them.
    """
    there = {name for name in files if name.endswith(extension)}
    found = [image[: image.rindex(".")] + extension for image in images]
    return [name if name in there else _without_face(name, there, extension) for name in found]


def _without_face(name: str, there: Collection[str], extension: str) -> str | None:
    pieces = name.removesuffix(extension).split("_")
    shorter = "_".join(pieces[:-4]) + extension
    return shorter if len(pieces) >= STEM_PIECES_WITH_FACE and shorter in there else None


def _problems(
    images: Sequence[str], files: Sequence[str | None], *, of_images: Mapping[str, str], of_captions: Mapping[str, str]
) -> dict[str, str]:
    """Why an image is left out, by its name: it cannot be read, or else its caption file cannot."""
    if not of_captions:
        return dict(of_images)
    by_caption = {
        image: of_captions[file] for image, file in zip(images, files, strict=True) if file and file in of_captions
    }
    return by_caption | dict(of_images)


def _list_images(folder: Path) -> tuple[Listing, list[str]]:
    if not folder.is_dir():
        raise UserError("the image folder does not exist", where=str(folder), fix="check image_dir / train_data_dir")
    listing = list_folder(folder)
    images = listing.images
    if not images:
        known = " ".join(sorted(IMAGE_EXTENSIONS))
        raise UserError(
            "the image folder holds no image",
            where=str(folder),
            fix=f"put images there (known extensions: {known}); sub-folders are not searched",
        )
    return listing, images
