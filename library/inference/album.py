"""The folder of a run's pictures: their names, what is there already, whose share they are, and writing them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from PIL import Image

from library.config.regional_networks import num_regional
from library.errors import Problem, UserError
from library.inference.grid import Sheet
from library.inference.grid_files import write_sheet
from library.inference.highres import first_stage
from library.inference.parameters_text import made_by, parameters_text
from library.inference.picture_log import PictureLog, entry_of
from library.inference.ranks import Share
from library.inference.request import GenRequest
from library.inference.saver import Saver
from library.inference.writer import ENDINGS, PARAMETERS, Names, misfit, png_text, save_picture
from library.log import get_logger

if TYPE_CHECKING:
    from library.config.run_config import RunConfig

logger = get_logger(__name__)

# Options that change no picture beyond what its request says, so that a run can go on with other ones.
_NOT_SEEN = frozenset({
    "prompt", "from_file", "interactive", "wildcard_dir", "shuffle_prompts", "outdir", "W", "H", "steps", "scale",
    "negative_scale", "guidance_rescale", "seed", "iter_same_seed", "sampler", "eta", "n_iter", "images_per_prompt",
    "batch_size", "vae_batch_size", "sequential_file_name", "network_show_meta", "guide_image_path",
    "image_path", "mask_path", "strength", "use_original_file_name", "highres_fix_scale", "highres_fix_steps",
    "highres_fix_strength", "highres_fix_save_1st", "highres_fix_latents_upscaling", "highres_fix_disable_control_net",
    "console_log_level", "console_log_file", "console_log_simple", "parameters_file", "resume_bulk",
    "prompts_per_rank", "grid", "from_module", "prompter_module_args",
})  # fmt: skip

_MODEL_FILES = (".safetensors", ".json")


class Album:
    """Where the pictures of a run go, job after job; `paths` are those that this process has written, in order."""

    def __init__(self, cfg: RunConfig, *, share: Share | None = None) -> None:
        self.options, self.pictures, self.share = cfg.generate, cfg.pictures, share or Share()
        self.folder = Path(self.options.outdir)
        self.stamp = time.strftime("%Y%m%d%H%M%S")
        ending = ENDINGS[self.pictures.image_format]
        originals = cfg.img2img.use_original_file_name
        sequential = self.options.sequential_file_name
        self.names = Names(ending, sequential=sequential, stamp=self.stamp, originals=originals)
        self.settings = _settings(cfg)
        self.saver = Saver()
        self.paths: list[Path] = []
        self.count = 0
        self.log: PictureLog | None = None
        if self.pictures.parameters_file:
            self.log = PictureLog(self.folder, rank=self.share.rank if self.share.num_ranks > 1 else None)
            self.log.start(afresh=not self.pictures.resume_bulk)

    @property
    def is_partial(self) -> bool:
        """Whether some pictures of a job may be drawn by others, or before."""
        return self.pictures.resume_bulk or self.share.num_ranks > 1

    def job(self, requests: Sequence[GenRequest], batches: Callable[[], Sequence[int]]) -> Job:
        """The next pictures of the run. batches: how many of them, one after the other, are drawn at once.

        Raises UserError for pictures that their files cannot hold, or whose files are read for the job.
        """
        start, self.count = self.count, self.count + len(requests)
        numbered = [replace(request, number=number) for number, request in enumerate(requests, start)]
        slots = [_Slot(self, stage, request) for request in numbered for stage in _stages(request)]
        problems = [problem for slot in slots for problem in slot.problems()]
        problems += self._overwritten(slots)
        if problems:
            raise UserError.from_problems(problems)
        return Job(self, numbered, slots, list(batches()) if self.is_partial else [])

    def _overwritten(self, slots: Sequence[_Slot]) -> Iterator[Problem]:
        """Pictures that would take the place of one that the job reads, perhaps before it is read for the last time."""
        folder, read = os.path.realpath(self.folder), {path for slot in slots for path in slot.reads}
        taken = {os.path.realpath(path) for path in read}
        for slot in slots:
            if os.path.join(folder, slot.file) in taken:
                what = "this picture would take the place of one that is drawn over or that controls the drawing"
                yield Problem(what, str(self.folder / slot.file), "name another outdir")

    def add_sheets(self, sheets: Sequence[Sheet], job: Job) -> None:
        """Draw the contact sheets of a job, once all its pictures are there; whichever rank is last does."""
        if job.files is None:
            return
        ending = ENDINGS[self.pictures.image_format]
        for number, sheet in enumerate(sheets, start=1):
            stem = f"grid_{number:06d}" if self.options.sequential_file_name else f"grid_{self.stamp}_{number:03d}"
            path = self.folder / (stem + ending)
            self.paths += write_sheet(sheet, job.files, path, quality=self.pictures.image_quality)


def _stages(request: GenRequest) -> list[GenRequest]:
    """The pictures of a request, each with its stage: where it is drawn in two sizes, perhaps the smaller one too."""
    if request.highres is None:
        return [request]
    whole = replace(request, stage="1")
    return [first_stage(request), whole] if request.highres.save_first else [whole]


class _Slot:
    """A picture of a run: its request, its name, and the line about it. whole: what its line asks for."""

    def __init__(self, album: Album, request: GenRequest, whole: GenRequest) -> None:
        assert whole.number is not None
        number = whole.number
        self.request = request
        self.is_time = album.names.is_time(request)
        made = made_by(album.options, request)
        self.parameters = parameters_text(request, made)
        self.reads = [path for path in (*request.control, request.image, request.mask) if isinstance(path, str)]
        read = {"pictures on disk": [_state(path) for path in self.reads]}
        settings = album.settings | (read if self.reads else {})
        self.entry = entry_of(request, made, number=number + 1, settings=settings)
        self.file = album.names.next(request, number)
        self.done: Mapping[str, Any] | None = None  # the line of the picture that is there

    def problems(self) -> list[Problem]:
        why = misfit(self.file, self.request.size, self.parameters)
        fix = "take another format (image_format, or the ending after --f)"
        return [Problem(why, f"{self.file}: {self.request.raw}", fix)] if why else []

    def find(self, known: Mapping[tuple[Any, Any], list[dict[str, Any]]], log: PictureLog) -> bool:
        """Look for the picture among the lines of the folder; its name must be right, unless it tells the time."""
        for entry in known.get((self.entry["number"], self.entry["fingerprint"]), ()):
            if (self.is_time or entry["file"] == self.file) and log.is_there(entry):
                self.done, self.file = entry, entry["file"]
                return True
        return False


class Job(AbstractContextManager["Job"]):
    """Pictures that are drawn in one go: `todo` are the requests to draw, each given to `take` with its picture.

    Used as a context: at its end, whatever happens, all pictures that were taken are written. Where only some
    pictures of a batch are missing all of it is drawn, since on a GPU a picture's last bits depend on how many are
    drawn at once.
    """

    def __init__(
        self, album: Album, requests: Sequence[GenRequest], slots: Sequence[_Slot], batches: Sequence[int]
    ) -> None:
        self.album, self.slots = album, slots
        self._first = len(album.paths)
        self._of: dict[tuple[int | None, str], _Slot] = {(s.request.number, s.request.stage): s for s in slots}
        self._taken: list[_Slot] = []
        self.todo = list(requests)
        if album.is_partial:
            if album.pictures.resume_bulk:
                self._look()
                found = sum(slot.done is not None for slot in slots)
                logger.info("%d of %d pictures are there already", found, len(slots))
            self.todo = self._share(requests, batches)

    @property
    def paths(self) -> list[Path]:
        """What this process has written for the job."""
        return self.album.paths[self._first :]

    @property
    def files(self) -> list[Path] | None:
        """The files of all pictures of the job, in order, without the smaller ones of pictures in two sizes; None while
        other ranks draw some of them.
        """
        others = self.album.share.num_ranks > 1
        if others and any(slot.done is None for slot in self.slots):
            return None
        return [self.album.folder / slot.file for slot in self.slots if slot.request.stage != "0"]

    def take(self, request: GenRequest, picture: Image.Image) -> None:
        """Write a picture, unless it is there already; encoding goes on while others are drawn."""
        slot, album = self._of[request.number, request.stage], self.album
        if slot.done is not None:
            return
        self._taken.append(slot)
        path = album.folder / slot.file
        text = png_text(slot.request) | {PARAMETERS: slot.parameters}

        def save() -> None:
            save_picture(picture, path, text, quality=album.pictures.image_quality)
            album.paths.append(path)
            entry = {"file": slot.file, "bytes": path.stat().st_size, **slot.entry}
            if album.log is not None:
                album.log.add(entry)
            slot.done = entry

        album.saver.give(save)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the pictures; then put the lines about them in order where others, or runs before, wrote some."""
        try:
            self.album.saver.finish()
        except Exception:
            if kind is None:
                raise
            logger.exception("a picture could not be written")
        if kind is None:
            self._settle()

    def _look(self) -> None:
        log = self.album.log
        if log is None:
            return
        known: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
        for entry in log.entries():
            known.setdefault((entry.get("number"), entry.get("fingerprint")), []).append(entry)
        for slot in self.slots:
            if slot.done is None:
                slot.find(known, log)

    def _share(self, requests: Sequence[GenRequest], batches: Sequence[int]) -> list[GenRequest]:
        """The requests of the batches that are this rank's and not there yet; batches stay what they are."""
        missing = {slot.request.number for slot in self.slots if slot.done is None}
        todo, start = [], 0
        for number, size in enumerate(batches):
            batch = requests[start : start + size]
            start += size
            if self.album.share.has(number) and any(request.number in missing for request in batch):
                todo += [replace(request, batch=number) for request in batch]
        return todo

    def _settle(self) -> None:
        log, album = self.album.log, self.album
        if log is None:
            return
        if album.share.num_ranks > 1:
            self._look()
            if any(slot.done is None for slot in self.slots):
                return  # a slower rank will do it
        if album.is_partial or self._taken != list(self.slots) or _has_repeats(log):
            log.settle([slot.done for slot in self.slots if slot.done is not None])


def _has_repeats(log: PictureLog) -> bool:
    """Whether earlier runs wrote lines about files that are other pictures now."""
    return log.whole.is_file() and log.whole.read_bytes().count(b"\n") > len(log.entries())


def _settings(cfg: RunConfig) -> dict[str, Any]:
    """What decides, beside the requests, how pictures look and are written; files with their size and time.

    A mask that says where networks act belongs to no request.
    """
    settings: dict[str, Any] = {}
    for group in cfg.groups.values():
        for name, option in type(group).options().items():
            if name not in _NOT_SEEN or (name == "mask_path" and num_regional(cfg)):
                value = getattr(group, name)
                settings[name] = value
                if option.is_path and value:
                    settings[f"{name} on disk"] = [_state(path) for path in (value if option.many else (value,))]
    return settings


def _state(path: str) -> Any:
    """Size in bytes and time of change of a file, or of a folder's files that a model can be made of; None for names of
    the hub.
    """
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).rglob("*") if file.suffix in _MODEL_FILES)
        return [[file.relative_to(path).as_posix(), *_state(str(file))] for file in files if file.is_file()]
    if not os.path.isfile(path):
        return None
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]
