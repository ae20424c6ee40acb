"""What an adapter is: a small module that adds something to the output of one frozen Linear or Conv2d."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_HOOK = "adapter_patch"


class Adapter(nn.Module):
    """Base of all adapter types: y = base(x) + multiplier * forward_delta(x).

    A type implements `forward_delta` (the addition to the output for an input) and `delta_weight` (the same as a
    weight of the base's shape, for merging), and names its tensors as they stand in the file, since
    `state_dict()` is what is saved. The base module is held without being registered, so an optimizer, DDP or a
    state dict sees the adapter's own parameters only.
    """

    # Tensors of the file that stay float32 whatever the precision of the rest.
    float32_tensors: frozenset[str] = frozenset({"alpha"})
    # Parameters that LoRA+ trains faster.
    plus_parameters: frozenset[str] = frozenset()

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, so that nn.Module does not register it as a child
        self.multiplier = 1.0
        self.enabled = True
        # What becomes of the addition where it acts in a part of a picture only.
        self.region: Callable[[Tensor], Tensor] | None = None

    @property
    def base(self) -> nn.Linear | nn.Conv2d:
        """The adapted module."""
        return self._base[0]

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype in which the adapter's matrix products run."""
        return next(self.parameters()).dtype

    def forward_delta(self, x: Tensor) -> Tensor:
        """What is added to the base's output for its input x, before the multiplier."""
        raise TypeError(f"{type(self).__name__} must define forward_delta")

    def forward_delta_from(self, x: Tensor, base_output: Tensor) -> Tensor:
        """As `forward_delta`, for kinds that make the addition from the base's output, which is at hand."""
        return self.forward_delta(x)

    def delta_weight(self) -> Tensor:
        """The same as a float32 weight in the base's shape, before the multiplier."""
        raise TypeError(f"{type(self).__name__} must define delta_weight")

    def load_file_tensors(self, values: Mapping[str, Tensor]) -> None:
        """Take over a file's tensors by their names in the module."""
        self.load_state_dict(dict(values))

    def limit_norm(self, limit: float) -> tuple[Tensor, Tensor] | None:
        """Shrink the addition to a Frobenius norm of at most `limit`; (norm afterwards, whether it was shrunk: 0 or 1).

        None for a kind that has no such norm.
        """
        return None

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to the device and dtype of a model that draws."""
        self.to(device=device, dtype=dtype)

    def attach(self) -> None:
        """Put the adapter into the base module's forward; several adapters on one module add up."""
        patch = self.base.__dict__.get(_HOOK)
        if patch is None:
            patch = _Patch(self.base)
        assert self not in patch.adapters, "the adapter is attached already"
        patch.adapters.append(self)

    def detach(self) -> None:
        """Take the adapter out again, in any order; the last one restores the module as it was."""
        patch = self.base.__dict__.get(_HOOK)
        assert patch is not None and self in patch.adapters, "the adapter is not attached"
        patch.adapters.remove(self)
        if not patch.adapters:
            patch.remove()


class _Patch:
    """Replaces one module's forward by the sum of itself and its adapters."""

    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        self.module = module
        self.previous = module.__dict__.get("forward")  # another library's patch, if there is one
        self.original_forward = module.forward
        self.adapters: list[Adapter] = []
        module.__dict__[_HOOK] = self
        module.__dict__["forward"] = self.forward

    def forward(self, x: Tensor) -> Tensor:
        base_output = out = self.original_forward(x)
        for adapter in self.adapters:
            # A multiplier of 0 leaves the base's output exactly as it is.
            if adapter.enabled and adapter.multiplier != 0:
                delta = adapter.forward_delta_from(_input_for(adapter, x), base_output)
                if adapter.region is not None:
                    delta = adapter.region(delta)
                out = torch.add(out, delta.to(out.dtype), alpha=adapter.multiplier)
        return out

    def remove(self) -> None:
        del self.module.__dict__[_HOOK]
        if self.previous is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.previous


def _input_for(adapter: Adapter, x: Tensor) -> Tensor:
    """x in the adapter's dtype, unless autocast will choose the dtype of its matrix products."""
    if torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(adapter.input_dtype)
