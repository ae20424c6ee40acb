"""Writes the trained weights as a file with all its metadata."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.io import hashing
from library.io.modelspec import modelspec_metadata, thumbnail_url
from library.io.safetensors_file import save
from library.log import get_logger
from library.training import metadata as meta
from library.training.hooks import View
from library.training.trainable import Trainable

if TYPE_CHECKING:
    from library.config.cli import RunConfig

log = get_logger(__name__)


class ModelWriter:
    """Called as `writer(path, view)`: exports the trainable, completes the metadata, writes atomically.

    metadata: the ss_* part that does not change while training.
    """

    def __init__(
        self,
        trainable: Trainable,
        *,
        dtype: torch.dtype | None,
        metadata: dict[str, str],
        cfg: RunConfig,
        prediction_type: str,
    ) -> None:
        self.trainable, self.dtype, self.metadata, self.cfg = trainable, dtype, metadata, cfg
        self.prediction_type = prediction_type

    def __call__(self, path: Path, view: View) -> None:
        """Write one checkpoint to `path`."""
        artifact = self.trainable.export(self.dtype)
        progress = view.progress
        epoch = progress.epoch if progress.step_in_epoch == 0 else progress.epoch + 1
        training = meta.at_save(
            self.metadata | artifact.metadata,
            finished_at=time.time(),
            steps=progress.global_step,
            epoch=epoch,
            minimum=self.cfg.network.no_metadata,
        )
        spec = self._modelspec()
        hashes = hashing.network_hashes(artifact.tensors, training)
        save(artifact.tensors, path, {**training, **spec, "sshs_model_hash": hashes[0], "sshs_legacy_hash": hashes[1]})
        log.info(f"saved {path}")

    def _modelspec(self) -> dict[str, str]:
        cfg = self.cfg
        fields = cfg.save.modelspec_fields()
        title = fields.pop("title", None) or cfg.save.output_name
        if "thumbnail" in fields:
            fields["thumbnail"] = thumbnail_url(fields["thumbnail"])
        return modelspec_metadata(
            "lora",
            created=datetime.now(),
            title=title,
            resolution=cfg.data.resolution,
            prediction_type=self.prediction_type,
            timestep_range=tuple(
                cfg.get(name) if cfg.is_given(name) else None for name in ("min_timestep", "max_timestep")
            ),
            clip_skip=cfg.model.clip_skip,
            fields=fields,
        )
