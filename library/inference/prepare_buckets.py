"""What prepare_buckets_latents.py does: latents beside the images, sizes and buckets in the metadata file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from library.config.dataset_file import dataset_specs
from library.config.prepare_buckets import PrepareRequest
from library.data.caching import CacheReport
from library.data.dataset import DataSettings, TrainData
from library.data.metadata_tools import find_images, read_entries, write_entries
from library.data.prepare_buckets import entry_names, note_buckets, place_images, without_image
from library.data.records import ScanReport
from library.inference.cache_tools import fill_latents
from library.log import get_logger

log = get_logger(__name__)

LISTED = 5


@dataclass(frozen=True)
class Prepared:
    """What was done: figures of the cache, of the metadata file, and what the user should know of."""

    cache: CacheReport
    output: Path
    entries: int
    new: int
    bad: int
    shared: tuple[str, ...]
    lost: tuple[str, ...]

    def lines(self) -> list[str]:
        """Lines for the terminal, the figures last."""
        lines = []
        if self.shared:
            lines.append(f"{len(self.shared)} names stand for several images (use --full_path): {_list(self.shared)}")
        if self.lost:
            lines.append(
                f"{len(self.lost)} entries have no image in the folder and stay as they are: {_list(self.lost)}"
            )
        if self.bad:
            lines.append(f"{self.bad} images cannot be used (named above); they have no train_resolution")
        lines.append(f"latents: {self.cache.line()}")
        lines.append(f"{self.entries} entries in {self.output}, {self.new} of them new")
        return lines


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def prepare(request: PrepareRequest) -> Prepared:
    """Encode what is not cached yet, on all processes that the launcher started; the first one writes the file.

    Raises UserError when the folder holds no usable image or a file cannot be read or written.
    """
    cfg = request.cfg
    for notice in cfg.notices:
        log.info(notice)
    assert cfg.data.in_json and cfg.data.train_data_dir
    metadata = read_entries(Path(cfg.data.in_json))
    root = Path(cfg.data.train_data_dir)
    images = find_images(root, recursive=request.recursive)
    state = PartialState(cpu=not torch.cuda.is_available())
    specs, report = dataset_specs(cfg), ScanReport()
    workers = request.workers or min(16, 4 * (os.cpu_count() or 1))
    table = place_images(images, specs[0], root=root, report=report, workers=workers)
    data = TrainData(specs, table, scan_report=report, settings=DataSettings(seed=0))
    log.info(data.summary().text())
    cache = fill_latents(cfg, data, state)
    names = entry_names(metadata, images, root=root, full_path=request.full_path)
    lost = without_image(metadata, names)
    new, shared = note_buckets(metadata, images, names, table=data.table)
    if state.is_main_process:
        write_entries(request.out_json, metadata)
    state.wait_for_everyone()
    state.destroy_process_group()
    bad = len(images) - len(data.table.images)
    return Prepared(cache, request.out_json, len(metadata), new, bad, tuple(shared), tuple(lost))
