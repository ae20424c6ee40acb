"""File names and keep rules of checkpoints: pure, as sd-scripts users know them (model_files.md section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Names:
    """Names of everything that a run writes into `output_dir`.

    base: `output_name`, or None: then "epoch", "at" and "last" stand for it.
    extension: with the dot; "" for folders (diffusers layout).
    """

    output_dir: Path
    base: str | None
    extension: str = ".safetensors"

    def epoch_stem(self, epoch: int) -> str:
        """Stem of the checkpoint after `epoch` (counted from 1)."""
        return f"{self.base or 'epoch'}-{epoch:06d}"

    def step_stem(self, step: int) -> str:
        """Stem of the checkpoint after optimizer step `step`."""
        return f"{self.base or 'at'}-step{step:08d}"

    def last_stem(self) -> str:
        """Stem of the final checkpoint."""
        return self.base or "last"

    def model(self, stem: str) -> Path:
        """Path of the model file with this stem."""
        return self.output_dir / f"{stem}{self.extension}"

    def ema_beside(self, model: Path) -> Path:
        """Path of the averaged weights that belong to a model file."""
        return model.with_name(f"{model.name.removesuffix(self.extension)}-ema{self.extension}")

    def state(self, stem: str) -> Path:
        """Path of the training state folder with this stem."""
        return self.output_dir / f"{stem}-state"


def tokens_beside(model: Path) -> Path:
    """The folder of embedding files that were trained together with the network in the file `model`."""
    return model.with_name(f"{model.stem}-tokens")


def save_period_from_ratio(num_epochs: int, ratio: int) -> int:
    """Epochs between saves for `--save_n_epoch_ratio`: at least 1, so that `ratio` files are written or fewer."""
    return max(1, num_epochs // ratio)


def epoch_is_saved(epoch: int, every: int | None, num_epochs: int) -> bool:
    """Whether the end of `epoch` (from 1) writes a checkpoint; the last epoch is only saved as the final file."""
    return every is not None and epoch % every == 0 and epoch < num_epochs


def step_is_saved(step: int, every: int | None) -> bool:
    """Whether optimizer step `step` (from 1) writes a checkpoint."""
    return every is not None and step % every == 0


def epoch_to_remove(epoch: int, every: int, keep: int | None) -> int | None:
    """The epoch whose checkpoint goes once `epoch` is saved and the last `keep` are to stay; None: nothing goes."""
    if keep is None:
        return None
    old = epoch - every * keep
    return old if old > 0 else None


def step_to_remove(step: int, every: int, keep: int | None) -> int | None:
    """The step whose checkpoint goes once `step` is saved: `keep` counts steps, rounded down to a saved one.

    every 10, keep 30: at step 50, step 10 goes and 20..50 stay (four files).
    """
    if keep is None:
        return None
    old = step - keep - 1
    old -= old % every
    return old if old > 0 else None
