"""Options about the training loop."""

from __future__ import annotations

from typing import ClassVar

from library.config.console import ConsoleOptions
from library.config.fields import REPORT, SHARED, TRAINER, option


class LoopOptions(ConsoleOptions):
    """How long, how precise, how it is watched."""

    title: ClassVar[str] = "training loop"
    acts: ClassVar[frozenset[str]] = TRAINER

    max_train_steps: int = option(1600, "optimizer steps", ge=1, acts=TRAINER | REPORT)
    max_train_epochs: int | None = option(
        None, "epochs; takes the place of max_train_steps", ge=1, zero_is_unset=True, acts=TRAINER | REPORT
    )
    gradient_accumulation_steps: int = option(1, "batches per optimizer step", ge=1, acts=TRAINER | REPORT)
    gradient_checkpointing: bool = option(False, "compute activations twice to save memory")
    mixed_precision: str = option("no", "precision of the computation", choices=["no", "fp16", "bf16"], acts=SHARED)
    seed: int | None = option(
        None,
        "seed of everything random (unset: a new one, shown and recorded)",
        ge=0,
        lt=2**63,
        acts=TRAINER | REPORT,
    )
    resume: str | None = option(None, "state folder to go on from", path=True)
    logging_dir: str | None = option(None, "folder for logs; every run makes a sub-folder with its time", path=True)
    log_prefix: str | None = option(None, "start of the name of that sub-folder")
    log_with: str | None = option(
        None,
        "trackers beside the JSONL log and TensorBoard, which are always on",
        choices=["tensorboard", "wandb", "all"],
    )
    log_tracker_name: str | None = option(None, "project in wandb (unset: network_train); sub-folder for TensorBoard")
    log_tracker_config: str | None = option(
        None, "TOML file with arguments for the trackers: tables [wandb] and [tensorboard]", path=True
    )
    wandb_run_name: str | None = option(None, "name of the run in wandb")
    wandb_api_key: str | None = option(
        None, "key for wandb; WANDB_API_KEY in the environment is safer, as other users see command lines"
    )
    log_config: bool = option(False, "send the settings to the trackers, without secrets and folder names")
    log_every_n_steps: int = option(10, "steps between two lines in the logs", ge=1)
    max_nonfinite_steps: int = option(
        50,
        "end the run, saved, after so many steps in a row whose loss or gradient is not finite (0: never)",
        ge=0,
    )
