"""`__name__` in a prompt: a line of the file name.txt of a folder. No torch."""

import difflib
from functools import cached_property
from pathlib import Path, PurePosixPath

from library.inference.prompt_source import PromptLine, file_lines

SUFFIX = ".txt"


class Wildcards:
    """The text files of a folder and its subfolders, each read once; without a folder there are none."""

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder) if folder else None
        self._read: dict[str, list[PromptLine]] = {}

    def __bool__(self) -> bool:
        return self.folder is not None

    def lines(self, name: str, *, asked_by: PromptLine, start: int, end: int) -> list[PromptLine]:
        """The lines of a file, at least one; blank ones and those that start with # are no lines.

        Raises UserError that points at asked_by.text[start:end] when there is no such file, or nothing in it.
        """
        assert self.folder is not None, "a prompt is read without wildcards where there is no folder"
        if name not in self._read:
            path = self.folder / (name + SUFFIX)
            if ".." in PurePosixPath(name).parts:
                raise asked_by.error(f"__{name}__ leads out of wildcard_dir", start, end, fix="name a file in it")
            if not path.is_file():
                near = difflib.get_close_matches(name, self.names, n=1)
                fix = f"did you mean __{near[0]}__?" if near else "make it, one entry per line"
                raise asked_by.error(f"there is no wildcard file {path}", start, end, fix=fix)
            self._read[name] = file_lines(path, kind="wildcard file")
        if not self._read[name]:
            fix = f"write one entry per line into {self.folder / (name + SUFFIX)}"
            raise asked_by.error(f"the wildcard file of __{name}__ holds no entry", start, end, fix=fix)
        return self._read[name]

    @cached_property
    def names(self) -> list[str]:
        """What can stand between the underscores."""
        assert self.folder is not None
        return sorted(path.relative_to(self.folder).with_suffix("").as_posix()
                      for path in self.folder.rglob(f"*{SUFFIX}"))  # fmt: skip
