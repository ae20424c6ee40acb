"""Training state on disk: everything mutable, so that k steps + resume + (N-k) steps equal N steps to the bit.

A state folder holds `state.json` (progress, run seed, what the data order depends on), `trained.safetensors` (the
trained tensors in full precision), and `optimizer.pt` / `scheduler.pt` / `scaler.pt`, read with weights_only=True.
Noise, timesteps and data order are derived from the seed, so no RNG state is stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from library.errors import UserError
from library.io.atomic import atomic_folder
from library.io.read_back import check_archive
from library.io.safetensors_file import TensorReader, save

FORMAT = 1


class Stateful(Protocol):
    """Owner of something mutable."""

    def state_dict(self) -> Mapping[str, Any]:
        """Everything that must survive, as tensors, numbers, strings and containers of them."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Take over what `state_dict` returned."""
        ...


@runtime_checkable
class Renewable(Protocol):
    """A Stateful that a run can go on without: what it holds can begin anew."""

    def start_anew(self) -> str:
        """Begin anew with what else was loaded, and say so in a sentence."""
        ...


@dataclass
class Progress:
    """Where a run is. `global_step` counts optimizer steps, `step_in_epoch` those of the running epoch (from 0)."""

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    samples: int = 0

    def advance(self, samples: int) -> None:
        """One optimizer step over `samples` real samples of all ranks was done."""
        self.step_in_epoch += 1
        self.global_step += 1
        self.samples += samples

    def next_epoch(self) -> None:
        """The running epoch is complete."""
        self.epoch += 1
        self.step_in_epoch = 0


@dataclass(frozen=True)
class RunFacts:
    """What the order of the data depends on; a state from other facts cannot be resumed in the middle of an epoch.

    data: from `data_identity`. accumulation: micro-batches per optimizer step.
    """

    run_seed: int
    data: str
    accumulation: int


def data_identity(pools: Iterable[Any], *, world: int, weights: Sequence[tuple[float, ...]] = ()) -> str:
    """Short hash of which samples there are, in which buckets, in global micro-batches of which size.

    Two ranks with a batch of 1 and one rank with a batch of 2 have the same identity, because they see the same data.
    `weights` are those of the resolutions of each data set, where an image has several.
    """
    digest = hashlib.blake2b(digest_size=12)
    for pool in pools:
        digest.update(repr((pool.dataset, tuple(pool.bucket), pool.batch_size * world)).encode())
        digest.update(repr([tuple(row) for row in pool.rows]).encode())
    if weights:
        digest.update(repr([tuple(map(float, each)) for each in weights]).encode())
    return digest.hexdigest()


@dataclass
class TrainingState:
    """The parts of a run that are saved together.

    trained: the module that owns the trained parameters (its own tensors only). others: name -> Stateful, each written
    with torch.save.
    """

    progress: Progress
    facts: RunFacts
    trained: torch.nn.Module
    others: dict[str, Stateful]

    def save(self, folder: Path) -> None:
        """Write all parts into a folder that appears whole; an older folder of that name is replaced.

        Every part is read back and compared before that. Raises UserError or OSError when it cannot be written.
        """
        with atomic_folder(folder) as partial:
            tensors = {name: value.detach().contiguous() for name, value in self.trained.state_dict().items()}
            save(tensors, partial / "trained.safetensors", {}, checked=True)
            for name, owner in self.others.items():
                torch.save(dict(owner.state_dict()), partial / f"{name}.pt")
                check_archive(partial / f"{name}.pt")
            description = {"format": FORMAT, "progress": asdict(self.progress), "facts": asdict(self.facts)}
            (partial / "state.json").write_text(json.dumps(description, indent=2), encoding="utf-8")

    def load(self, folder: Path) -> list[str]:
        """Restore everything from `folder`; returns sentences about what will not be exact (empty: it is exact)."""
        description = read_description(folder)
        with TensorReader(folder / "trained.safetensors") as reader:
            stored = {name: reader.get(name) for name in reader}
        current = self.trained.state_dict()
        if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in current.items()}:
            raise UserError(
                f"the state holds {len(stored)} trained tensors that do not fit the {len(current)} of this run",
                where=f"--resume {folder}",
                fix="resume with the network settings (module, dim, arguments) that the state was saved with",
            )
        sentences = _alphas(current, stored)
        self.trained.load_state_dict(stored)
        for name, owner in self.others.items():
            part = folder / f"{name}.pt"
            if not part.exists():
                if isinstance(owner, Renewable):
                    sentences.append(owner.start_anew())
                    continue
                raise UserError(f"{part.name} is missing", where=f"--resume {folder}", fix="resume from another state")
            _load_into(owner, torch.load(part, map_location="cpu", weights_only=True), where=str(part))
        if (folder / "ema.pt").exists() and "ema" not in self.others:
            sentences.append("the average of the weights in the state is left behind, without --use_ema")
        vars(self.progress).update(description["progress"])
        return sentences + self._check_facts(RunFacts(**description["facts"]))

    def _check_facts(self, saved: RunFacts) -> list[str]:
        changed = [name for name, value in asdict(saved).items() if asdict(self.facts)[name] != value]
        if not changed or not self.progress.step_in_epoch:
            return [f"{name} differs from the state's" for name in changed]
        self.progress.step_in_epoch = 0
        reasons = ", ".join(changed)
        return [f"{reasons} differ from the state's: the epoch that was interrupted starts again from its first sample"]


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of `state.json`; raises UserError when `folder` is not a state folder of this suite."""
    path = folder / "state.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "name the folder that ends in -state"
        if (folder / "train_state.json").exists() or (folder / "random_states_0.pkl").exists():
            hint = "this is a state of another trainer; continue from its weights with --network_weights instead"
        raise UserError("there is no state.json", where=f"--resume {folder}", fix=hint) from None
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"state.json cannot be read: {error}", where=f"--resume {folder}", fix="use another state"
        ) from error
    if description.get("format") != FORMAT:
        raise UserError(
            f"the state has format {description.get('format')}, this version reads {FORMAT}",
            where=f"--resume {folder}",
            fix="resume with the version that wrote it",
        )
    return description


def _alphas(current: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> list[str]:
    names = [name for name in stored if name.endswith(".alpha") and float(stored[name]) != float(current[name])]
    if not names:
        return []
    return [f"network_alpha is the state's ({float(stored[names[0]]):g}), not {float(current[names[0]]):g} of this run"]


def _load_into(owner: Stateful, state: Mapping[str, Any], *, where: str) -> None:
    try:
        owner.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"the saved {Path(where).stem} does not fit this run: {error}",
            where=where,
            fix="resume with the optimizer and network settings that the state was saved with",
        ) from error
    if isinstance(owner, torch.optim.Optimizer):
        _restore_dtypes(owner, state)


def _restore_dtypes(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Undo torch's cast of optimizer state to the parameter's dtype: some optimizers keep float32 state for bf16."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        current = optimizer.state[params[index]]
        for name, value in saved.items():
            if isinstance(value, torch.Tensor) and name in current and current[name].dtype != value.dtype:
                current[name] = value.to(current[name].device)
