"""From latents to pictures, also while the next batch is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.inference.batch_invariance import batch_invariant
from library.models.bundle import ModelBundle
from library.models.families import sdxl

_SPARE = 0.9  # of the memory that may be used before decoding beside the drawing is too risky


@torch.no_grad()
def decoded(bundle: ModelBundle, latents_BChw: Tensor, at_once: int) -> Iterator[Image.Image]:
    """Pictures of scaled latents (B, 4, h, w), `at_once` of them in memory."""
    for part in latents_BChw.split(at_once):
        if part.device.type == "cpu":  # whose convolutions are faster so; batch_invariant relies on it
            part = part.contiguous(memory_format=torch.channels_last)
        with batch_invariant(bundle.vae, len(part)):
            pixels = sdxl.decode_latents(bundle.vae, part / bundle.scaling_factor).float()
        values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        for picture in values.permute(0, 2, 3, 1).cpu().numpy():
            yield Image.fromarray(np.ascontiguousarray(picture))


class Decoder:
    """Decodes batches in order: at once, or in a thread while the next batch is drawn.

    beside: whether in a thread; None: on a CUDA device, once the first batch has shown that drawing and decoding fit
    into its memory together. To be used as a context.
    """

    def __init__(self, bundle: ModelBundle, at_once: int, *, beside: bool | None = None) -> None:
        self.bundle, self.at_once, self.beside = bundle, at_once, beside
        self._cuda = bundle.vae.device.type == "cuda"
        if beside is None and not self._cuda:
            self.beside = False
        self._thread: ThreadPoolExecutor | None = None
        self._stream: Any = None
        self._running: Future[list[Image.Image]] | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def begin(self, latents_BChw: Tensor) -> Callable[[], list[Image.Image]]:
        """Start to decode scaled latents; returns a function that waits for the pictures."""
        if not self.beside:
            pictures = self._measured(latents_BChw) if self.beside is None else self._decoded(latents_BChw)
            return lambda: pictures
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "decoder")
            self._stream = torch.cuda.Stream(self.bundle.vae.device) if self._cuda else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(latents_BChw.device))
            latents_BChw.record_stream(self._stream)
        self._running = self._thread.submit(self._in_thread, latents_BChw)
        return self._running.result

    def wait(self) -> None:
        """Wait until the VAE is free, for who needs it beside the decoder."""
        if self._running is not None:
            self._running.exception()

    def _decoded(self, latents_BChw: Tensor) -> list[Image.Image]:
        return list(decoded(self.bundle, latents_BChw, self.at_once))

    def _in_thread(self, latents_BChw: Tensor) -> list[Image.Image]:
        if self._stream is None:
            return self._decoded(latents_BChw)
        with torch.cuda.stream(self._stream):
            return self._decoded(latents_BChw)

    def _measured(self, latents_BChw: Tensor) -> list[Image.Image]:
        """Decode the first batch, after its drawing, and find out whether both fit into the memory together."""
        device = latents_BChw.device
        drawing, idle = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        pictures = self._decoded(latents_BChw)
        decoding = torch.cuda.max_memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        self.beside = fits_beside(drawing=drawing, decoding=decoding, idle=idle, room=free)
        return pictures


def fits_beside(*, drawing: int, decoding: int, idle: int, room: int) -> bool:
    """Whether two kinds of work fit into `room` bytes together, by the peaks of each alone above `idle` bytes."""
    return drawing + decoding - idle <= _SPARE * room
