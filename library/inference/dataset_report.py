"""Composition of the dataset report: from the settings to a text, a JSON file and a page. Needs no torch."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from library.config.dataset_file import dataset_specs
from library.config.report import ReportOptions
from library.config.run_config import RunConfig
from library.data.cache_places import index_folder
from library.data.inspection import Inspection, InspectionSettings, inspect
from library.data.report_files import report_text, write_report_json
from library.data.report_page import write_report_page
from library.log import current_rank, get_logger
from library.models.token_ids import count_tokens
from library.models.tokenizers import load_tokenizer

log = get_logger(__name__)

PAGE_NAME = "dataset_report.html"
"""The page that --debug_dataset writes into output_dir."""


def report_dataset(cfg: RunConfig) -> Inspection:
    """What tools/dataset_report.py does: the text on the console, and the files that are asked for."""
    inspection = _inspected(cfg, epoch=cfg.report.epoch, thumbnails=_thumbnails(cfg))
    _print(report_text(inspection))
    for path, write in ((cfg.report.json_file, write_report_json), (cfg.report.html_file, write_report_page)):
        if path:
            write(inspection, path)
            _print(f"\nwritten: {path}")
    return inspection


def debug_dataset(cfg: RunConfig) -> None:
    """What the trainers' --debug_dataset does, on the first process: the text, and a page in output_dir."""
    if current_rank() != 0:
        return
    inspection = _inspected(cfg, epoch=0, thumbnails=ReportOptions.options()["max_thumbnails"].default)
    _print(report_text(inspection))
    assert cfg.save.output_dir is not None
    page = Path(cfg.save.output_dir) / PAGE_NAME
    write_report_page(inspection, page)
    _print(f"\nwritten: {page}\nnothing is trained, because of --debug_dataset")


def _thumbnails(cfg: RunConfig) -> int:
    return cfg.report.max_thumbnails if cfg.report.html_file else 0


def _inspected(cfg: RunConfig, *, epoch: int, thumbnails: int) -> Inspection:
    for notice in cfg.notices:
        log.info(notice)
    if cfg.loop.seed is None:
        log.info("seed 0 is used, because --seed is not given; a training run then draws a seed of its own")
    settings = InspectionSettings(
        count_tokens=partial(count_tokens, load_tokenizer(), weighted=cfg.model.weighted_captions),
        seed=cfg.loop.seed or 0,
        epoch=epoch,
        max_token_length=cfg.model.max_token_length,
        legacy_crop=cfg.data.legacy_crop_conditioning,
        is_cached=cfg.data.cache_latents,
        world=int(os.environ.get("WORLD_SIZE") or 1),
        accumulation=cfg.loop.gradient_accumulation_steps,
        max_train_steps=cfg.loop.max_train_steps,
        max_train_epochs=cfg.loop.max_train_epochs,
        cache_dir=index_folder(cfg),
        num_variants=cfg.data.text_cache_variants if cfg.data.cache_text_encoder_outputs else 1,
        thumbnails=thumbnails,
    )
    return inspect(dataset_specs(cfg), settings)


def _print(text: str) -> None:
    """Print names and captions of any script, also on a console that cannot show them."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
