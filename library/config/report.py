"""Options of the report about a dataset."""

from __future__ import annotations

from typing import ClassVar

from library.config.fields import REPORT, Group, option


class ReportOptions(Group):
    """Which files are written, and which epoch they show."""

    title: ClassVar[str] = "dataset report"
    acts: ClassVar[frozenset[str]] = REPORT

    json_file: str | None = option(
        None, "write every image and every problem to this file", path=True, aliases=["json"]
    )
    html_file: str | None = option(
        None, "write a page with pictures, which needs no other file, to this file", path=True, aliases=["html"]
    )
    epoch: int = option(0, "epoch whose captions, crops and mirrorings are shown, counted from 0", ge=0)
    max_thumbnails: int = option(2000, "pictures in the page; images with problems come first", ge=0)
