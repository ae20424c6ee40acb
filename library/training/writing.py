"""Writes the trained weights, a network or a whole model, with all their metadata."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import torch

from library.io import hashing
from library.io.modelspec import Kind, modelspec_metadata, thumbnail_url
from library.io.safetensors_file import save
from library.log import current_rank, get_logger
from library.models.families import sdxl
from library.training import metadata as meta
from library.training.hooks import View
from library.training.trainable import ExportsNetwork

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.bundle import ModelBundle

log = get_logger(__name__)


class ModelWriter:
    """Called as `writer(path, view)`: exports the trainable, completes the metadata, writes atomically, reads back.

    metadata: the ss_* part that does not change while training. The hashes of the base model's files are computed
    behind the first steps, because reading a checkpoint of 7 GB whole would hold the start up by half a minute.
    check(path, is_last=...) judges the written file (export_check); None for networks that cannot be opened again.
    """

    def __init__(
        self,
        trainable: ExportsNetwork,
        *,
        dtype: torch.dtype | None,
        metadata: dict[str, str],
        cfg: RunConfig,
        bundle: ModelBundle,
        check: Callable[..., None] | None = None,
    ) -> None:
        self.trainable, self.dtype, self.metadata, self.cfg = trainable, dtype, metadata, cfg
        self.check = check
        self.prediction_type = bundle.prediction_type
        self._hashes: Future[dict[str, str]] = Future()
        self.is_minimal = "network" in cfg.groups and cfg.network.no_metadata
        if self.is_minimal or current_rank():  # other ranks write no files
            self._hashes.set_result({})
        else:
            work = partial(_settle, self._hashes, partial(model_hashes, bundle, vae=cfg.model.vae))
            Thread(target=work, name="model hashes", daemon=True).start()

    def __call__(self, path: Path, view: View) -> None:
        """Write one checkpoint to `path`."""
        artifact = self.trainable.export(self.dtype)
        progress = view.progress
        epoch = progress.epoch if progress.step_in_epoch == 0 else progress.epoch + 1
        training = meta.at_save(
            self.metadata | self._hashes.result() | artifact.metadata,
            finished_at=time.time(),
            steps=progress.global_step,
            epoch=epoch,
            minimum=self.is_minimal,
        )
        spec = modelspec(self.cfg, getattr(self.trainable, "modelspec_kind", "lora"), self.prediction_type)
        hashes = hashing.network_hashes(artifact.tensors, training)
        spec |= {"sshs_model_hash": hashes[0], "sshs_legacy_hash": hashes[1]}
        save(artifact.tensors, path, {**training, **spec}, checked=True)
        if self.check is not None:
            self.check(path, is_last=view.stop or progress.global_step >= view.total_steps)
        log.info(f"saved {path}")


class CheckpointWriter:
    """Called as `writer(path, view)`: writes the whole model as a single file or, with `save_as` "diffusers", a folder.

    The header of a single file holds modelspec entries only (model_files.md section 6).
    """

    def __init__(self, bundle: ModelBundle, *, save_as: str, dtype: torch.dtype | None, cfg: RunConfig) -> None:
        self.bundle, self.save_as, self.dtype, self.cfg = bundle, save_as, dtype, cfg

    def __call__(self, path: Path, view: View) -> None:
        """Write one checkpoint to `path`."""
        header = modelspec(self.cfg, "checkpoint", self.bundle.prediction_type)
        sdxl.save(self.bundle, path, save_as=self.save_as, dtype=self.dtype, metadata=header)
        log.info(f"saved {path}")


def checkpoint_format(cfg: RunConfig, bundle: ModelBundle) -> str:
    """How a whole model is saved, "safetensors" or "diffusers": as asked, else as the base model was."""
    asked = cfg.save.save_model_as
    if asked is None:
        return "diffusers" if bundle.resolved_path.is_dir() else "safetensors"
    return "safetensors" if asked == "safetensors" else "diffusers"


def modelspec(cfg: RunConfig, kind: Kind, prediction_type: str) -> dict[str, str]:
    """The `modelspec.*` entries of a file that this run writes now."""
    fields = cfg.save.modelspec_fields()
    title = fields.pop("title", None) or cfg.save.output_name
    if "thumbnail" in fields:
        fields["thumbnail"] = thumbnail_url(fields["thumbnail"])
    return modelspec_metadata(
        kind,
        created=datetime.now(),
        title=title,
        resolution=cfg.data.resolution,
        prediction_type=prediction_type,
        timestep_range=tuple(
            cfg.get(name) if cfg.is_given(name) else None for name in ("min_timestep", "max_timestep")
        ),
        clip_skip=cfg.model.clip_skip,
        fields=fields,
    )


def _settle(future: Future[dict[str, str]], work: Callable[[], dict[str, str]]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # handed to whoever asks for the result
        future.set_exception(error)


def model_hashes(bundle: ModelBundle, *, vae: str | None) -> dict[str, str]:
    """Names and hashes of the files that a run starts from (model_files.md section 10); folders have only a name."""
    found = {"ss_sd_model_name": Path(bundle.source).name}
    if bundle.resolved_path.is_file():
        found["ss_sd_model_hash"] = hashing.legacy_hash(bundle.resolved_path)
        found["ss_new_sd_model_hash"] = hashing.sha256_file(bundle.resolved_path)
    if vae:
        found["ss_vae_name"] = Path(vae).name
        if Path(vae).is_file():
            found["ss_vae_hash"] = hashing.legacy_hash(Path(vae))
            found["ss_new_vae_hash"] = hashing.sha256_file(Path(vae))
    return found
