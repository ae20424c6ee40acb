"""What differs between training modes, and nothing else: the `Trainable` protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, runtime_checkable

from torch import Tensor, dtype, nn

from library.models import arch

if TYPE_CHECKING:
    from library.data.types import Batch
    from library.inference.controls import Controls
    from library.models.arch import SdxlArch
    from library.models.bundle import ModelBundle

Part = Literal["unet", "te1", "te2"]

# What `ModelBundle` calls each part.
PART_MODULES: dict[Part, arch.Part] = {"unet": "unet", "te1": "text_encoder_1", "te2": "text_encoder_2"}


class ParamGroup(TypedDict):
    """One optimizer group: `name` appears in logs, `lr` is absolute, `params` are leaf tensors that require grad."""

    name: str
    params: list[Tensor]
    lr: float


@dataclass(frozen=True)
class Artifact:
    """What a trainable writes: named CPU tensors in the file's own key names, and the metadata that it knows itself."""

    tensors: Mapping[str, Tensor]
    metadata: dict[str, str]


class Trainable(Protocol):
    """A training mode, composed into the one loop (never a subclass of it).

    trains: the parts whose forward pass needs gradients. It decides freezing and which caches are legal: text outputs
        may be cached only when neither "te1" nor "te2" is in it.
    loads: names of the parts that are read from the checkpoint, as `load_bundle` knows them.
    owns: the parts whose own weights are trained and therefore kept in the precision of training.
    needs: names of extra `Batch` fields that must be present, checked before any weight is loaded.
    may_skip_modules: True when a forward pass may leave a trained parameter unused (DDP must then search for them).
    Two more attributes are looked up by name: `hooks()`, hooks of its own, and `tokens`, the NewTokens that it trains.
    """

    trains: frozenset[Part]
    owns: frozenset[Part]
    loads: Sequence[str]
    needs: frozenset[str]
    may_skip_modules: bool

    def prepare(self, bundle: ModelBundle, *, seed: int) -> None:
        """Change `bundle`, just loaded, before anything is cached or attached; draws only from `seed`."""
        ...

    def attach(self, bundle: ModelBundle) -> nn.Module:
        """Inject what is trained into `bundle` (already frozen) and return the module that owns the parameters."""
        ...

    def param_groups(self) -> list[ParamGroup]:
        """The optimizer's groups, in the order in which they are logged and saved."""
        ...

    def forward_scope(self, batch: Batch) -> AbstractContextManager[Any]:
        """A context around the U-Net call, for modes that condition it (LLLite); a null context elsewhere."""
        ...

    def after_step(self) -> Mapping[str, Tensor]:
        """Called after each optimizer step; returns 0-d tensors to log (read only at the logging interval)."""
        ...


class ExportsNetwork(Trainable, Protocol):
    """A training mode whose result is a small file of its own, beside the base model."""

    def metadata(self) -> dict[str, str]:
        """What the trainable itself knows for the file's header; cheap, no tensor is copied."""
        ...

    def export(self, dtype: dtype | None) -> Artifact:
        """The trained weights under the names of their file format, cast to `dtype` (None: as they are)."""
        ...


@runtime_checkable
class FitsBase(Protocol):
    """A training mode that starts from files made for one base model."""

    def check_base(self, arch: SdxlArch) -> None:
        """Raise UserError where its files do not fit a base model of `arch`; called before one is loaded."""
        ...


@runtime_checkable
class FollowsImages(Protocol):
    """A training mode whose sample pictures need control images."""

    def controls(self) -> Controls:
        """What follows the control images of sample pictures, once `attach` was called."""
        ...
