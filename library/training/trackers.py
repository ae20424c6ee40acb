"""Programs that show the numbers of a run while it goes: TensorBoard always, Weights & Biases on request."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.config.sanitised import sanitised
from library.config.tracker_file import read_tracker_file
from library.errors import UserError
from library.log import get_logger

if TYPE_CHECKING:
    from library.config.cli import RunConfig

log = get_logger(__name__)

# The projects of sd-scripts, so that runs of both lie side by side.
_PROJECTS = {
    "sdxl_train": "finetuning",
    "sdxl_train_textual_inversion": "textual_inversion",
    "sdxl_train_control_net_lllite": "lllite_control_net_train",
}


class Tracker(Protocol):
    """Is told numbers by name and optimizer step; steps never fall within a run."""

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Note `values` of `step`; names hold one slash, before which the panel stands."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Event files in `folder`. settings: shown as a text (`--log_config`); arguments: of `SummaryWriter`."""

    def __init__(
        self, folder: Path, *, settings: Mapping[str, Any] | None = None, arguments: Mapping[str, Any] | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(folder), **(arguments or {}))
        except TypeError as error:
            raise _wrong_arguments("tensorboard", error) from error
        if settings is not None:
            text = json.dumps(settings, indent=2, ensure_ascii=False)
            self._writer.add_text("settings", "\n".join(f"    {line}" for line in text.splitlines()))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """One scalar for each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; `WANDB_MODE=offline` keeps it in `folder`. arguments: of `wandb.init`."""

    def __init__(self, folder: Path, *, settings: Mapping[str, Any] | None, arguments: Mapping[str, Any]) -> None:
        wandb = _wandb()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _hidden_arguments():
                self._run = wandb.init(**{"dir": str(folder), "config": settings, **arguments})
        except TypeError as error:
            raise _wrong_arguments("wandb", error) from error
        except Exception as error:  # wandb's own exceptions, network and all
            raise _no_wandb(error) from error

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """One call for the whole step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def check(cfg: RunConfig) -> None:
    """Log in to Weights & Biases before anything is loaded; called on the main process. Raises UserError.

    The key is that of `--wandb_api_key`, or what wandb finds itself (WANDB_API_KEY, an earlier `wandb login`).
    """
    if not _wants_wandb(cfg):
        return
    wandb = _wandb()
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    try:
        # Without a key wandb asks for one on the console, where there may be nobody.
        logged_in = wandb.login(**({"key": cfg.loop.wandb_api_key} if cfg.loop.wandb_api_key else {}), timeout=30)
    except Exception as error:  # wandb's own exceptions, network and all
        raise _no_wandb(error) from error
    if not logged_in:
        raise _no_wandb("not logged in")


def open_trackers(cfg: RunConfig) -> list[Tracker]:
    """The trackers of a run, in `--logging_dir` or `<output_dir>/logs`; called on the main process."""
    loop = cfg.loop
    folder = Path(loop.logging_dir) if loop.logging_dir else Path(cfg.save.output_dir) / "logs"
    arguments = read_tracker_file(loop.log_tracker_config) if loop.log_tracker_config else {}
    settings = sanitised(cfg) if loop.log_config else None
    events = folder / f"{loop.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}" / (loop.log_tracker_name or "")
    trackers: list[Tracker] = [TensorBoard(events, settings=settings, arguments=arguments.get("tensorboard"))]
    if _wants_wandb(cfg):
        named = {"project": loop.log_tracker_name or _PROJECTS.get(cfg.run, "network_train")}
        if loop.wandb_run_name:
            named["name"] = loop.wandb_run_name
        trackers.append(Wandb(folder, settings=settings, arguments=named | arguments.get("wandb", {})))
    return trackers


def _wants_wandb(cfg: RunConfig) -> bool:
    return cfg.loop.log_with in ("wandb", "all")


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb is not installed", "log_with", "pip install wandb") from error
    return wandb


def _no_wandb(error: object) -> UserError:
    return UserError(
        f"Weights & Biases cannot be reached: {error}",
        where="log_with",
        fix="log in with `wandb login` or set WANDB_API_KEY, set WANDB_MODE=offline to keep the run on this "
        "machine, or leave log_with out",
    )


@contextmanager
def _hidden_arguments() -> Iterator[None]:
    """wandb notes the command line, with the key that may stand there, and folders that are nobody's business."""
    arguments = sys.argv[1:]
    del sys.argv[1:]
    try:
        yield
    finally:
        sys.argv[1:] = arguments


def _wrong_arguments(name: str, error: TypeError) -> UserError:
    return UserError(f"[{name}] does not fit: {error}", "log_tracker_config", "remove the argument")
