"""The commands of the tool that looks after caches: what they print, and the models that entries are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from library.config.dataset_file import dataset_specs
from library.config.run_config import RunConfig
from library.data import cache_cleaning, cache_convert
from library.data.assemble import assemble
from library.data.cache_places import CachePlace, index_folder, packed_folder
from library.data.cache_survey import Identity, Kind, PackedPart, Part, Survey, counts
from library.data.captions import has_one_wording
from library.data.table import ImageTable
from library.log import get_logger
from library.models import checkpoint

log = get_logger(__name__)

_LISTED = 20
_STATUSES = ("valid", "foreign", "stale", "broken", "missing")


def run(cfg: RunConfig) -> int:
    """Do what `cfg.admin.command` says and print the result; returns the exit code."""
    for notice in cfg.notices:
        log.info(notice)
    table, report = assemble(dataset_specs(cfg), seed=cfg.loop.seed or 0, cache_dir=index_folder(cfg))
    for skipped in report.skipped:
        log.info("left out: %s: %s", skipped.path, skipped.reason)
    survey = Survey(
        table,
        npz=CachePlace("npz", index_folder(cfg)),
        packed=CachePlace("packed", packed_folder(cfg)),
        models=_models(cfg),
        max_token_length=cfg.model.max_token_length,
        weighted=cfg.model.weighted_captions,
    )
    commands: dict[str, Callable[[Survey, Sequence[Kind], RunConfig], int]] = {
        "status": _status,
        "verify": _verify,
        "pack": _convert,
        "unpack": _convert,
        "clean": _clean,
    }
    return commands[cfg.admin.command or "status"](survey, _kinds(table), cfg)


def _kinds(table: ImageTable) -> list[Kind]:
    """What can be cached of this data set."""
    kinds: list[Kind] = []
    names = ("random_crop", "face_crop_aug_range")
    if found := [name for name in names if any(getattr(subset, name) for subset in table.subsets)]:
        print(f"latents are left out: {' and '.join(found)} cannot be cached")
    else:
        kinds.append("latents")
    if all(map(has_one_wording, table.subsets)):
        kinds.append("text")
    else:
        print("text is left out: captions are shuffled or have several wordings")
    return kinds


def _models(cfg: RunConfig) -> Identity:
    """The models that entries should be made by, when the settings name some; says which."""
    name = cfg.model.pretrained_model_name_or_path
    if not name:
        print("no model is named: entries are judged by images, placements and captions, whatever model made them")
        return Identity()
    bundle = checkpoint.load_bundle(
        name,
        vae=cfg.model.vae,
        parts=("vae",),
        disable_mmap=cfg.model.disable_mmap_load_safetensors,
    )
    print(f"entries are judged by the VAE and text encoders of {cfg.model.vae or name}")
    return Identity(bundle.vae_id(), bundle.text_encoder_id())


def _status(survey: Survey, kinds: Sequence[Kind], cfg: RunConfig) -> int:
    rows = [["kind", "store", *_STATUSES, "orphaned", "unused", "bytes", "dead bytes"]]
    reasons: dict[str, int] = {}
    for part in survey.parts(kinds):
        found = counts(part)
        others = [len(part.orphaned), len(part.unused), part.num_bytes, part.dead_bytes]
        rows.append([part.kind, _store(part), *(f"{found[status]}" for status in _STATUSES), *map(str, others)])
        for check in part.checks:
            if check.reasons:
                line = f"{part.kind} ({_store(part)}): {'; '.join(check.reasons)}"
                reasons[line] = reasons.get(line, 0) + 1
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) if n < 2 else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
    for line, count in sorted(reasons.items()):
        print(f"  {line} ({count})")
    return 0


def _verify(survey: Survey, kinds: Sequence[Kind], cfg: RunConfig) -> int:
    total = deleted = 0
    for part in survey.parts(kinds):
        broken = cache_cleaning.find_broken(part)
        total += len(broken)
        for item in broken:
            print(f"broken: {item.place}: {item.reason}")
        if cfg.admin.delete_broken:
            deleted += cache_cleaning.delete_broken(part, broken)
    print(f"broken {total}" + (f", deleted {deleted}" if cfg.admin.delete_broken else ""))
    return 1 if total > deleted else 0


def _convert(survey: Survey, kinds: Sequence[Kind], cfg: RunConfig) -> int:
    failed = 0
    for kind in kinds:
        if cfg.admin.command == "pack":
            done = cache_convert.pack(survey, kind, remove=cfg.admin.remove)
        else:
            done = cache_convert.unpack(survey, kind)
        print(
            f"{kind}: written {done.written}, there already {done.there}, removed {done.removed}, "
            f"failed {len(done.failed)}"
        )
        for item in done.failed[:_LISTED]:
            print(f"  failed: {item.path}: {item.reason}")
        failed += len(done.failed)
    return 1 if failed else 0


def _clean(survey: Survey, kinds: Sequence[Kind], cfg: RunConfig) -> int:
    removals = [cache_cleaning.find_removable(part) for part in survey.parts(kinds)]
    for removal in removals:
        part = removal.part
        for path in removal.files:
            print(f"{path}")
        if isinstance(part, PackedPart) and removal.has_work:
            count = 0 if removal.positions is None else len(removal.positions)
            print(f"{part.store.folder}: {count} entries and replaced records, {removal.num_bytes} bytes")
        if cfg.admin.yes:
            cache_cleaning.remove(removal)
    files = sum(len(removal.files) for removal in removals)
    total = sum(removal.num_bytes for removal in removals)
    what = "removed" if cfg.admin.yes else "would be removed (--yes does it)"
    print(f"{files} files, {total} bytes in all: {what}")
    return 0


def _store(part: Part) -> str:
    return "packed" if isinstance(part, PackedPart) else "npz"
