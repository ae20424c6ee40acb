"""A saved network is opened again, put on the base, and must do what the live one does; else the save is an error.

That the file holds the bytes that were written is checked while writing. Here the question is whether those bytes are
the network: names, ranks, alphas, kinds. Two checks (the live weights are first rounded to the file's precision, so
that what saving rounds is no difference):

- of every module, at every save: both adapters have the same alpha, and answer one random input of a few rows. A
  network of rank 32 on full SDXL costs about as much as a hundredth of a training step.
- of the whole model, at the first save and the last: the U-Net's output (and, when they take part in training, that of
  the text encoders) for one fixed picture of 128 pixels with the live network, and with the file's in its place.

Both run on the process that writes and hold nothing that ranks must do together; random generators, modes, weights and
multipliers are afterwards as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from library.diffusion.conditioning import TextCond
from library.errors import UserError
from library.io.safetensors_file import TensorReader
from library.log import get_logger
from library.models.families import sdxl
from library.training.evaluation import eval_mode, kept_random_state

if TYPE_CHECKING:
    from library.models.bundle import ModelBundle
    from networks._adapter import Adapter
    from networks._network import AdapterNetwork

log = get_logger(__name__)

_PROMPT = "a photo of a cat, sitting on a red chair"
_CELLS = 16  # latent cells of the picture, each way
_ROWS = 3
# Equal weights in equal operations: what differs is the order of sums at most, or a norm that was taken on another
# device. A wrong name, rank or alpha differs by a hundredth of the effect or more.
_OF_EFFECT = 1e-3
_EPSILONS = 8
_WAY_OUT = "the file was set aside; save in another precision or kind, and report this: it is a defect"


class SavesNetwork(Protocol):
    """A training mode that can open what it saves."""

    network: AdapterNetwork

    def read_saved(self, bundle: ModelBundle, tensors: Mapping[str, Tensor], *, where: str) -> AdapterNetwork:
        """The network that a saved file describes, on the same base, not attached."""
        ...


@dataclass
class ExportCheck:
    """Called as `check(path, is_last=…)` after a network was written; raises UserError when it differs.

    with_text: whether the text encoders are on the device and take part. autocast: the context of training's forward.
    """

    trainable: SavesNetwork
    bundle: ModelBundle
    with_text: bool
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    _has_run: bool = False

    def __call__(self, path: Path, *, is_last: bool) -> None:
        """Compare the file with the live network; one that differs is renamed to `….differs`."""
        live = self.trainable.network
        bundle = self.bundle
        with ExitStack() as stack:
            stack.enter_context(kept_random_state())
            stack.enter_context(eval_mode((bundle.unet, bundle.text_encoder_1, bundle.text_encoder_2, live)))
            stack.enter_context(torch.no_grad())
            tensors = stack.enter_context(TensorReader(path))
            try:
                again = self.trainable.read_saved(bundle, tensors, where=str(path)).eval()
                complaint = _other_modules(live, again)
            except UserError as error:  # such as numbers that are not finite
                complaint = error.problems[0].what
            if complaint is None:
                _like(again, live)
                stack.enter_context(rounded(live, {key: tensors[key].dtype for key in tensors}))
                complaint = _different_setting(live, again) or _different_module(live, again)
            if complaint is None and (is_last or not self._has_run):
                complaint = self._different_output(live, again)
        if complaint is not None:
            aside = path.with_name(path.name + ".differs")
            path.replace(aside)
            raise UserError(f"the saved network is not the trained one: {complaint}", str(aside), _WAY_OUT)
        self._has_run = True

    def _different_output(self, live: AdapterNetwork, again: AdapterNetwork) -> str | None:
        multiplier = live.multiplier
        ours = self._outputs()
        live.set_multiplier(0.0)
        try:
            again.set_multiplier(multiplier)
            again.attach()
            try:
                theirs = self._outputs()
            finally:
                again.detach()
            if all(torch.equal(our, theirs[name]) for name, our in ours.items()):
                return None
            base = self._outputs()
        finally:
            live.set_multiplier(multiplier)
        for name, our in ours.items():
            if not torch.isfinite(our).all():
                log.warning(f"{name} with the trained network is not finite; so it will be with the file")
                continue
            error, limit = _distance(our, theirs[name], base[name])
            if not error <= limit:
                return f"on one picture, {name} differs by {error:.3g}, at most {limit:.3g} is rounding"
        return None

    def _outputs(self) -> dict[str, Tensor]:
        """What the model makes of one fixed picture and text, in the dtype that it computes in."""
        unet, device = self.bundle.unet, next(self.bundle.unet.parameters()).device
        generator = torch.Generator().manual_seed(0)
        config = unet.config
        latents = torch.randn(1, config.in_channels, _CELLS, _CELLS, generator=generator).to(device)
        hidden = torch.randn(1, 77, config.cross_attention_dim, generator=generator).to(device)
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        text = TextCond(hidden, torch.randn(1, width, generator=generator).to(device))
        pixels = float(8 * _CELLS)
        sizes = torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]])
        found = {}
        with self.autocast():
            if self.with_text:
                tokens = sdxl.tokenize(self.bundle.tokenizer, [_PROMPT])
                text = sdxl.encode_text(self.bundle.text_encoder_1, self.bundle.text_encoder_2, tokens)
                text = text.to(device=device)
                found["the text encoders' output"] = text.hidden_BTD
            timestep = torch.tensor([500], device=device)
            found["the prediction"] = sdxl.predict(unet, latents, timestep, text, sizes.to(device))
        return found


@contextmanager
def rounded(network: AdapterNetwork, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """The network's weights rounded to `dtypes` (by name in the file); afterwards the very same tensors are back."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for name, adapter in network.adapters.items():
            for key, tensor in adapter.state_dict(keep_vars=True).items():
                stored = dtypes.get(f"{name}.{key}", tensor.dtype)
                if stored != tensor.dtype and tensor.is_floating_point():
                    kept.append((tensor, tensor.data))
                    tensor.data = tensor.data.to(stored).to(tensor.dtype)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _other_modules(live: AdapterNetwork, again: AdapterNetwork) -> str | None:
    missing, more = live.adapters.keys() - again.adapters.keys(), again.adapters.keys() - live.adapters.keys()
    if missing:
        return f"{len(missing)} modules are not found in it, among them {min(missing)}"
    return f"{len(more)} modules are only in it, among them {min(more)}" if more else None


def _like(again: AdapterNetwork, live: AdapterNetwork) -> None:
    """Give every parameter and buffer the device and dtype of its counterpart."""
    for name, adapter in live.adapters.items():
        first = next(adapter.parameters())
        other = again.adapters[name]
        other.to(device=first.device)
        own = dict([*adapter.named_parameters(), *adapter.named_buffers()])
        for key, tensor in [*other.named_parameters(), *other.named_buffers()]:
            if key in own and tensor.is_floating_point():
                tensor.data = tensor.data.to(own[key].dtype)


def _different_setting(live: AdapterNetwork, again: AdapterNetwork) -> str | None:
    """Alpha and the like, which may act only when weights have grown (OFT's bound)."""
    for name, adapter in live.adapters.items():
        theirs = again.adapters[name].state_dict()
        for key, value in adapter.named_buffers():
            if key in theirs and not torch.equal(value, theirs[key]):
                return f"{name}.{key} is {float(theirs[key]):.6g} in it, and {float(value):.6g} in the network"
    return None


def _different_module(live: AdapterNetwork, again: AdapterNetwork) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for name, adapter in live.adapters.items():
        x = _probe(adapter, generator)
        our, their = adapter.forward_delta(x).float(), again.adapters[name].forward_delta(x).float()
        if torch.isfinite(our).all():
            error, limit = float((our - their).norm()), _OF_EFFECT * float(our.norm())
            if not error <= limit:
                limit += _noise(adapter, x.dtype)
            if not error <= limit:
                return f"for a random input, {name} answers otherwise ({error:.3g}, at most {limit:.3g} is rounding)"
    return None


def _probe(adapter: Adapter, generator: torch.Generator) -> Tensor:
    """A random input for the adapter's module, in the adapter's dtype."""
    base = adapter.base
    if isinstance(base, nn.Conv2d):
        x = torch.randn(1, base.in_channels, *(side + 1 for side in base.kernel_size), generator=generator)
    else:
        x = torch.randn(_ROWS, base.in_features, generator=generator)
    first = next(adapter.parameters())
    return x.to(first.device, first.dtype)


def _noise(adapter: Adapter, dtype: torch.dtype) -> float:
    """What rounding does to an answer of the module itself; kinds that start from it (DoRA, OFT) inherit that."""
    weight = adapter.base.weight.float() * getattr(adapter.base, "weight_scale", 1.0)
    return _EPSILONS * _ROWS * torch.finfo(dtype).eps * float(weight.norm())


def _distance(ours: Tensor, theirs: Tensor, base: Tensor) -> tuple[float, float]:
    """(distance of the two outputs, what rounding can explain)."""
    noise = _EPSILONS * torch.finfo(ours.dtype).eps * float(ours.float().norm())
    ours, theirs, base = ours.float(), theirs.float(), base.float()
    return float((ours - theirs).norm()), _OF_EFFECT * float((ours - base).norm()) + noise
