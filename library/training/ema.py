"""Exponential moving average of the trained weights (Polyak & Juditsky 1992), kept beside them in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**26
"""Elements that are averaged at once on a CUDA device, where a difference is held in memory: 256 MiB."""


@dataclass(frozen=True)
class Decay:
    """How much of the average one optimizer step keeps; the formulas are those of diffusers' EMAModel.

    With n = step - after - 1 steps averaged before this one: 0 for n <= 0 (the average is the weights), else
    1 - (1 + n / inv_gamma) ** -power with `warmup` and (1 + n) / (10 + n) without, clamped to [lowest, highest].
    """

    highest: float = 0.9999
    lowest: float = 0.0
    after: int = 0
    warmup: bool = False
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def at(self, step: int) -> float:
        """The decay in [0, 1] of optimizer step `step`, counted from 1."""
        n = step - self.after - 1
        if n <= 0:
            return 0.0
        grown = 1 - (1 + n / self.inv_gamma) ** -self.power if self.warmup else (1 + n) / (10 + n)
        return max(min(grown, self.highest), self.lowest)


class Ema:
    """The average of some parameters, in float32 whatever their dtype: in bfloat16 a decay of 0.9999 would not move it.

    params: names and the leaf tensors themselves, which stay the same objects for the whole run. interval: optimizer
    steps between two updates; an update then keeps the product of the decays of its steps, so that the average reaches
    equally far back at any interval. A step whose gradient was not finite, and which left the weights alone, does
    nothing to the average. on_cpu: the average lies in host memory; from a CUDA device the weights are then copied into
    pinned memory on a stream of their own and averaged by a thread, while the next step runs.
    """

    def __init__(self, params: Mapping[str, Tensor], decay: Decay, *, interval: int = 1, on_cpu: bool = False) -> None:
        self.decay, self.interval = decay, interval
        self._params = dict(params)
        device = "cpu" if on_cpu else None
        self._average = {
            name: p.detach().to(device=device or p.device, dtype=torch.float32, copy=True)
            for name, p in self._params.items()
        }
        self._kept = self._one()
        self._is_swapped = False
        is_offloaded = on_cpu and any(p.is_cuda for p in self._params.values())
        self._offload = _Offload() if is_offloaded else None

    def _one(self) -> Tensor:
        """1 where the weights are: what is kept of the average, by the steps since its last update (0-d float64)."""
        device = next(iter(self._params.values())).device
        return torch.ones((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, step: int, *, was_skipped: Tensor | None = None) -> None:
        """Take in optimizer step `step` (from 1); was_skipped: 0-d, 1 for a step that left the weights as they were.

        Every `interval` steps the average moves towards the weights. Nothing waits for the device.
        """
        assert not self._is_swapped, "the average is in the place of the weights"
        moved = 1.0 if was_skipped is None else 1.0 - was_skipped.to(self._kept)
        self._kept = self._kept * (1.0 - (1.0 - self.decay.at(step)) * moved)
        if step % self.interval:
            return
        weights, averages = [p.detach() for p in self._params.values()], list(self._average.values())
        if self._offload is not None:
            self._offload.start(weights, averages, self._kept)
        elif self._kept.is_cuda:
            _blend_on_device(averages, weights, 1.0 - self._kept)
        else:
            _blend(averages, weights, 1.0 - float(self._kept))
        self._kept = self._one()

    def before_weights_change(self) -> None:
        """Have the device finish copying the weights before anything that is queued from now on; needs no waiting."""
        if self._offload is not None:
            self._offload.fence()

    def _finish(self) -> None:
        if self._offload is not None:
            self._offload.finish()

    def average(self) -> dict[str, Tensor]:
        """The average by the names of the parameters, float32; not copied."""
        self._finish()
        return self._average

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The average in the place of the weights; afterwards, also after an error, these are back bit for bit.

        Where an average lies on the device of its weights, the tensors change places; else the weights wait in host
        memory, so that the device never holds both.
        """
        assert not self._is_swapped, "the average is in the place of the weights already"
        self._finish()
        undo: list[tuple[Tensor, Tensor, bool]] = []
        self._is_swapped = True
        try:
            for name, p in self._params.items():
                average = self._average[name]
                if average.device == p.device:
                    undo.append((p, p.data, True))
                    p.data = average.to(p.dtype)
                else:
                    undo.append((p, p.detach().to(average.device, copy=True), False))
                    p.data.copy_(average)
            yield
        finally:
            for p, weights, is_pointer in reversed(undo):
                if is_pointer:
                    p.data = weights
                else:
                    p.data.copy_(weights)
            self._is_swapped = False

    def restart(self) -> None:
        """Begin anew with the weights as they are now."""
        self._finish()
        for name, p in self._params.items():
            self._average[name].copy_(p.detach())
        self._kept = self._one()

    def start_anew(self) -> str:
        """What a resumed run does whose state has no average: begin with its weights. Returns the sentence to tell."""
        self.restart()
        return "the state holds no average of the weights (--use_ema); it begins anew with the weights of the state"

    def state_dict(self) -> dict[str, Any]:
        """The average and what the steps since its last update keep of it."""
        assert not self._is_swapped, "the average is in the place of the weights"
        return {"average": dict(self.average()), "kept": float(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned. Raises ValueError when it is of other parameters."""
        stored = state["average"]
        if {name: value.shape for name, value in stored.items()} != {n: a.shape for n, a in self._average.items()}:
            raise ValueError(f"it averages {len(stored)} tensors that do not fit the {len(self._average)} of this run")
        self._finish()
        for name, value in stored.items():
            self._average[name].copy_(value)
        self._kept = self._one() * state["kept"]


def _blend(averages: list[Tensor], weights: list[Tensor], share: float) -> None:
    """averages += (weights - averages) * share, in place."""
    for start in range(0, len(averages), 64):  # a wider dtype of few tensors at a time
        wide = [w.to(a.dtype) for w, a in zip(weights[start : start + 64], averages[start : start + 64], strict=True)]
        torch._foreach_lerp_(averages[start : start + 64], wide, share)


def _blend_on_device(averages: list[Tensor], weights: list[Tensor], share: Tensor) -> None:
    """The same with a share that only the device knows."""
    share = share.float()
    start, size = 0, 0
    for end, average in enumerate(averages, 1):
        size += average.numel()
        if size >= CHUNK or end == len(averages):
            change = torch._foreach_sub([w.float() for w in weights[start:end]], averages[start:end])
            torch._foreach_mul_(change, share)
            torch._foreach_add_(averages[start:end], change)
            start, size = end, 0


class _Offload:
    """Brings weights from CUDA devices into host memory and has a thread average them there."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._stream = torch.cuda.Stream()
        self._pinned: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._job: Future[None] | None = None

    def start(self, weights: list[Tensor], averages: list[Tensor], kept: Tensor) -> None:
        """Begin to copy the weights and then to average them; `fence` must come before they change."""
        self.finish()
        sources = [*weights, kept]
        if not self._pinned:
            self._pinned = [torch.empty_like(source, device="cpu", pin_memory=True) for source in sources]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for pinned, source in zip(self._pinned, sources, strict=True):
                pinned.copy_(source, non_blocking=True)
        # The caching allocator must not hand out this small tensor's memory while it is being copied.
        kept.record_stream(self._stream)
        copied = self._copied = torch.cuda.Event()
        copied.record(self._stream)
        self._job = self._thread.submit(self._average, copied, averages)

    def _average(self, copied: torch.cuda.Event, averages: list[Tensor]) -> None:
        copied.synchronize()
        *weights, kept = self._pinned
        with torch.no_grad():  # a thread has a grad mode of its own
            _blend(averages, weights, 1.0 - float(kept))

    def fence(self) -> None:
        """The current stream goes on when the weights are copied."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def finish(self) -> None:
        """Wait until the average is complete; raises what the thread has raised."""
        if self._job is not None:
            self._job.result()
            self._job = None
