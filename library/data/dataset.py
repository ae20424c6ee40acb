"""The training data of a run: scanned, put into buckets, and served epoch by epoch as groups of batches."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Sampler

from library.config.dataset_file import DatasetSpec
from library.data import report
from library.data.assemble import assemble, balance_reg
from library.data.batching import MicroBatch, Pool, epoch_plan, rank_rows
from library.data.collate import BatchBuilder, Work
from library.data.epochs import EpochPools
from library.data.latent_filling import LatentFiller
from library.data.records import ImageRecord, ScanReport, Skipped
from library.data.report import DataSummary
from library.data.stores import LatentStore, TextStore
from library.data.table import ImageTable
from library.data.token_counts import CountTokens, TokenSummary, count_tokens
from library.data.types import Batch, Place, SampleKey, StepGroup
from library.data.validation import validation_specs
from library.diffusion.conditioning import Tokens
from library.errors import UserError
from library.log import get_logger

log = get_logger(__name__)

Tokenize = Callable[[list[str]], Tokens]


@dataclass(frozen=True)
class DataSettings:
    """What batches depend on besides the data sets.

    `tokenize` runs in the main process only; without it batches have no tokens. `num_workers` processes (never more
    than there are CPU cores) read the files of coming batches; `persistent_workers` keeps them from epoch to epoch.
    `legacy_crop` gives the size ids of sd-scripts. With `count_tokens` the summary says which captions are longer than
    `max_token_length`. What is found in the image folders is noted below `cache_dir`, or in each folder.
    """

    seed: int
    tokenize: Tokenize | None = None
    world: int = 1
    rank: int = 0
    accumulation: int = 1
    num_workers: int = 0
    persistent_workers: bool = False
    legacy_crop: bool = False
    count_tokens: CountTokens | None = None
    max_token_length: int = 75
    cache_dir: Path | None = None


def build_train_data(specs: Sequence[DatasetSpec], **settings: Any) -> TrainData:
    """Scan the folders and metadata files of `specs`, read image sizes and captions, and place every image in a bucket.

    `settings` are the fields of DataSettings; `seed` is required. Images that cannot be used are left out and listed
    in `summary()`. Raises UserError when a folder is missing or empty or when nothing is left to train on.
    """
    chosen = DataSettings(**settings)
    table, scan_report = assemble(specs, seed=chosen.seed, cache_dir=chosen.cache_dir)
    return TrainData(specs, table, scan_report=scan_report, settings=chosen)


class TrainData:
    """Serves the batches of one rank. All ranks build the same object and take different rows of it.

    `all_images` is the whole table, which caches are made for, `table` the part that is served. `validation` serves the
    images that are held out, each once per epoch, or is None; its epoch 0 is the same in every run of one seed.
    """

    def __init__(
        self,
        specs: Sequence[DatasetSpec],
        table: ImageTable,
        *,
        scan_report: ScanReport,
        settings: DataSettings,
        serves_validation: bool = False,
    ) -> None:
        self.specs = tuple(specs)
        self.settings = settings
        self.scan_report = scan_report
        self._num_workers = min(settings.num_workers, os.cpu_count() or 1)
        self._latents: LatentStore | None = None
        self._filler: LatentFiller | None = None
        self._text: TextStore | None = None
        self._total_steps: int | None = None
        self._reported: set[str] = set()
        self.all_images = table
        self.table = table.part(validation=serves_validation)
        self._group()
        self.validation = None if serves_validation else self._held_out()

    def _held_out(self) -> TrainData | None:
        if not self.all_images.num_held_out:
            return None
        specs = validation_specs(self.all_images, self.specs)
        seeds = [spec.validation_seed for spec in specs if spec.validation_seed is not None]
        settings = replace(
            self.settings, seed=seeds[0] if seeds else self.settings.seed, accumulation=1, count_tokens=None
        )
        return TrainData(specs, self.all_images, scan_report=ScanReport(), settings=settings, serves_validation=True)

    def _group(self) -> None:
        if not len(self.table.images):
            raise UserError(
                "no image is left to train on",
                where=", ".join(subset.place for spec in self.specs for subset in spec.subsets),
                fix=report.skipped_text(self.scan_report.skipped),
            )
        self._pools = EpochPools(self.table, self.specs, seed=self.settings.seed)
        self._starts = [0]
        self._loader: DataLoader | None = None
        self._tokens: TokenSummary | None = None

    @property
    def records(self) -> list[ImageRecord]:
        """Every image that is trained on, in scan order."""
        return [self.table.record(image) for image in self.table.images.tolist()]

    @property
    def pools(self) -> list[Pool]:
        """Every image in every bucket where it may turn up, once per repeat; with one resolution, every epoch's."""
        return self._pools.offered

    @property
    def epochs_are_equal(self) -> bool:
        """Whether all epochs have the same number of steps, which a choice between resolutions prevents."""
        return self._pools.are_equal

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of one epoch, counted from 0."""
        return -(-self._pools.micro_batches(epoch, world=self.settings.world) // self.settings.accumulation)

    def steps_before(self, epoch: int) -> int:
        """Optimizer steps of all epochs before this one."""
        if self.epochs_are_equal:
            return epoch * self.steps_in(0)
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + self.steps_in(len(self._starts) - 1))
        return self._starts[epoch]

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches per rank in the first epoch."""
        return self._pools.micro_batches(0, world=self.settings.world)

    def drop(self, failures: Sequence[Skipped]) -> None:
        """Leave images out for the rest of the run, by path. Every rank must drop the same ones."""
        if failures:
            self.scan_report.skipped.extend(failures)
            self.table.drop({failure.path for failure in failures})
            balance_reg(self.all_images)
            self._group()
            if self.validation is not None and self.all_images.num_held_out:
                self.validation._group()
            else:
                self.validation = None

    def attach_latents(self, store: LatentStore) -> None:
        """Take images from `store` from now on; pixels are no longer read."""
        missing = self.table.rows[~store.has(self.table.rows)]
        assert not len(missing), f"{len(missing)} images have no latents, e.g. {self.table[int(missing[0])]}"
        self._latents = store
        self._loader = None
        if self.validation is not None:
            self.validation.attach_latents(store)

    def fill_latents(self, filler: LatentFiller) -> None:
        """Take images from the cache that `filler` completes while the epochs run. A collective call."""
        self._filler = filler
        store = filler.end_epoch()
        self.drop(filler.failures)  # of held-out images: no other has been met
        self._take_filled(store)

    def finish_filling(self) -> None:
        """Tell the other ranks what was made since the last full epoch. A collective call at the end of a run."""
        if self._filler is not None and not self._filler.is_complete:
            self._take_filled(self._filler.end_epoch())

    def close(self) -> None:
        """Store latents that are still to be stored."""
        if self._filler is not None:
            self._filler.close()

    def _take_filled(self, store: LatentStore) -> None:
        self._latents = store
        self._loader = None
        if self.validation is not None:
            self.validation.attach_latents(store)

    def attach_text(self, store: TextStore) -> None:
        """Take encoded captions from `store` from now on; captions are no longer tokenised."""
        missing = self.table.images[~store.has(self.table.images)]
        assert not len(missing), f"{len(missing)} captions are not encoded, e.g. {self.table.record(int(missing[0]))}"
        self._text = store
        self._loader = None
        if self.validation is not None:
            self.validation.attach_text(store)

    def share_caches(self, other: TrainData) -> None:
        """Take encoded images and captions from where `other` takes them, also what is encoded when it is met."""
        self._latents, self._text, self._filler = other._latents, other._text, other._filler
        self._loader = None

    def set_length(self, total_steps: int) -> None:
        """Say how many optimizer steps the run has; a token warm-up over a share of the run needs it."""
        self._total_steps = total_steps
        self._loader = None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepGroup]:
        """The optimizer steps of one epoch (counted from 0), from `start_step` on.

        A pure function of (seed, epoch, data, global batch size, length of the run): the same with any number of
        workers, and equal to the tail of the whole epoch when it starts later.
        """
        settings = self.settings
        plan = epoch_plan(
            self._pools.pools(epoch),
            world=settings.world,
            accumulation=settings.accumulation,
            seed=settings.seed,
            epoch=epoch,
        )
        first = self.steps_before(epoch)

        def works() -> Iterator[Work]:
            for step in range(start_step, len(plan)):
                for micro in plan[step]:
                    yield Work(epoch, rank_rows(micro, rank=settings.rank, world=settings.world), first + step)

        batches = self._batches(works())
        for step in range(start_step, len(plan)):
            group = plan[step]
            places = self._places(group, plan.samples_before(step))
            micro_batches = [self._finish(next(batches), places) for _ in group]
            yield StepGroup(micro_batches, samples=sum(len(micro.rows) for micro in group))
        if self._filler is not None and not self._filler.is_complete:
            self._take_filled(self._filler.end_epoch())

    def summary(self) -> DataSummary:
        """Counts for the plan that is printed before training; tokens are counted once, by the first rank."""
        settings = self.settings
        if settings.count_tokens is not None and self._tokens is None and settings.rank == 0:
            self._tokens = count_tokens(self.table, settings.count_tokens, limit=settings.max_token_length)
        return report.summarise(self.specs, self.table, scan_report=self.scan_report, tokens=self._tokens)

    def ss_metadata(self, *, user_config: bool = True) -> dict[str, str]:
        """The data set part of a network file's ss_* metadata; `user_config` says that --dataset_config was given."""
        return report.ss_metadata(
            self.specs,
            self.table,
            batches_per_epoch=self.batches_per_epoch,
            total_batch_factor=self.settings.world * self.settings.accumulation,
            user_config=user_config,
        )

    def _builder(self) -> BatchBuilder:
        return BatchBuilder(
            self.table,
            seed=self.settings.seed,
            legacy_crop=self.settings.legacy_crop,
            latents=self._latents,
            text=self._text,
            total_steps=self._total_steps,
        )

    def _batches(self, works: Iterator[Work]) -> Iterator[Batch]:
        """Batches in the order of `works`; workers are used only when there are files to read."""
        from_memory = self._latents is not None and self._latents.in_memory
        from_memory = from_memory and (self._text is None or self._text.in_memory)
        from_memory = from_memory and not any(subset.control_dir for subset in self.table.subsets)
        if self._num_workers == 0 or from_memory:
            builder = self._builder()
            return (builder[work] for work in works)
        if self._loader is None or not self.settings.persistent_workers:
            self._loader = self._make_loader()
        assert isinstance(self._loader.sampler, _WorkList)
        self._loader.sampler.works = works
        return iter(self._loader)

    def _make_loader(self) -> DataLoader:
        return DataLoader(
            self._builder(),
            batch_size=None,
            sampler=_WorkList(),
            num_workers=self._num_workers,
            persistent_workers=self.settings.persistent_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_init_worker,
            # The iterator draws a base seed for the workers' global generators, which nothing here uses; a private
            # generator keeps that draw away from the training process's global one.
            generator=torch.Generator(),
        )

    def _places(self, group: Sequence[MicroBatch], first: int) -> dict[SampleKey, Place]:
        """Where the samples of a step stand; `first` is the number of samples of the epoch before it."""
        rows = [row for micro in group for row in micro.rows]
        keys = [SampleKey(self.table.keys.text(int(self.table.image_of[image])), repeat) for image, repeat in rows]
        return {key: Place(first + index, index, len(rows)) for index, key in enumerate(keys)}

    def _finish(self, batch: Batch, places: Mapping[SampleKey, Place]) -> Batch:
        for path, reason in batch.failures:
            if path not in self._reported:
                self._reported.add(path)
                log.warning("skipped in training: %s: %s", path, reason)
        if self._filler is not None:
            batch = self._filler.fill(batch)
        batch = replace(batch, places=tuple(places[key] for key in batch.keys))
        if batch.text is None and self.settings.tokenize is not None:
            return replace(batch, tokens=self.settings.tokenize(batch.captions))
        return batch


class _WorkList(Sampler[Work]):
    """The work of the coming epoch; exchanged between epochs so that workers can stay alive."""

    def __init__(self) -> None:
        self.works: Iterator[Work] = iter(())

    def __iter__(self) -> Iterator[Work]:
        return self.works


def _init_worker(worker: int) -> None:
    # Ctrl-C goes to the whole process group; the trainer finishes its step and then ends the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
