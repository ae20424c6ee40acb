"""Networks that act in parts of a picture, each with a sub-prompt of its own ("a AND b").

In the U-Net a network's addition is weighed by its mask, in the rows of the negative prompt too. Cross-attention reads
the sub-prompts one by one, from the same queries; network i acts on keys, values and the output projection of
sub-prompt i only, and on those of no negative prompt:

    out = sum_i m_i W o_i / (sum_i m_i + 1e-4) + sum_i m_i D_i(o_i)

with o_i what attention finds in sub-prompt i, W the output projection and D_i the addition of network i to it. Layers
without places (embeddings of time and size) take 1 / n of every addition, n sub-prompts. Source: gen_img.md sections
5 and 13, sd-scripts' regional LoRA ("Attention Couple").

Shape letters: B pictures, R rows of the U-Net (branches of guidance times B), n sub-prompts, T text positions of one of
them, D text width, K tokens of a layer, C channels, h w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.config.regional_networks import num_regional
from library.errors import UserError
from library.inference.followers import BeforeCall, UNetCall
from library.inference.region_masks import in_cells, region_masks, shares, total
from library.inference.request import GenRequest, split_and
from library.inference.source_pictures import picture_files
from library.io.images import read_image
from library.plugins import load_plugin
from networks._foreign import is_foreign
from networks._network import AdapterNetwork

if TYPE_CHECKING:
    from library.config.run_config import RunConfig

_TOKENS_OF = "Transformer2DModel"  # diffusers' blocks whose layers work on tokens instead of cells
_CROSS = "attn2"


class Regional:
    """A follower that gives attached networks their parts of the picture; network i belongs to sub-prompt i.

    pixels_HW3: the picture of the masks, uint8; color_codes: see `region_masks`.
    """

    def __init__(
        self,
        unet: Any,
        networks: Sequence[AdapterNetwork],
        pixels_HW3: Tensor,
        *,
        color_codes: int | None = None,
    ) -> None:
        self._unet = unet
        self._networks = tuple(networks)
        self._pixels, self._color_codes = pixels_HW3, color_codes

    @contextmanager
    def only(self, index: int) -> Iterator[None]:
        """In the text encoders only network number `index` acts; none when there is no such network."""
        others = [
            adapter
            for number, network in enumerate(self._networks)
            for name, adapter in network.adapters.items()
            if number != index and network.targets[name].part != "unet"
        ]
        before = [adapter.enabled for adapter in others]
        try:
            for adapter in others:
                adapter.enabled = False
            yield
        finally:
            for adapter, enabled in zip(others, before, strict=True):
                adapter.enabled = enabled

    @contextmanager
    def on(self, batch: Sequence[GenRequest], *, calls: int, device: torch.device) -> Iterator[BeforeCall]:
        """Divide the U-Net's work among the sub-prompts of a batch, of which all pictures have as many."""
        num_parts = len(split_and(batch[0].prompt))
        assert len(self._networks) <= num_parts, "the prompts are checked before"
        masks = region_masks(self._pixels, count=num_parts, color_codes=self._color_codes)
        division = _Division(masks.to(device), num_pictures=len(batch))
        with ExitStack() as stack:
            stack.enter_context(_known_cells(self._unet, division))
            stack.enter_context(_divided_attention(self._unet, division))
            stack.enter_context(_weighed_additions(self._networks, division))
            yield division.begin


def only_of(followers: Sequence[Any]) -> Callable[[int], AbstractContextManager[None]] | None:
    """What lets a single network act in the text encoders, where there is a Regional among the followers."""
    return next((follower.only for follower in followers if isinstance(follower, Regional)), None)


class _Division:
    """Of one batch: the masks in every layer, and which rows belong to which sub-prompt.

    The U-Net has R rows: those of the negative prompts (with guidance), of the prompts, and of no prompt (with a
    negative_scale), B each. In cross-attention the B of the prompts stand there n times, one sub-prompt after the
    other; the text of every row holds n T positions.
    """

    def __init__(self, masks_nHW: Tensor, *, num_pictures: int) -> None:
        self.num_parts, self.num_pictures = len(masks_nHW), num_pictures
        self.cells = (0, 0)  # of the transformer that is at work
        self._masks = masks_nHW
        self._in_cells: dict[tuple[int, int], Tensor] = {}
        self._num_branches = 1
        self._text: tuple[Tensor | None, Tensor | None] = None, None  # of the U-Net, of cross-attention

    def begin(self, call: UNetCall) -> None:
        """Take note of the branches of a call of the U-Net."""
        self._num_branches = len(call.x_BChw) // self.num_pictures

    @property
    def _before(self) -> int:
        """The rows before those of the prompts."""
        return 0 if self._num_branches == 1 else self.num_pictures

    def masks(self, cells: tuple[int, int]) -> Tensor:
        """(n, h, w), float32."""
        if cells not in self._in_cells:
            self._in_cells[cells] = in_cells(self._masks, cells)
        return self._in_cells[cells]

    # --- cross-attention ---

    def spread(self, x_RKC: Tensor) -> Tensor:
        """The rows of cross-attention from those of the U-Net."""
        start, end = self._before, self._before + self.num_pictures
        return torch.cat([x_RKC[:start], *[x_RKC[start:end]] * self.num_parts, x_RKC[end:]])

    def texts(self, text_RTD: Tensor) -> Tensor:
        """Each of those rows' own T positions; the same tensor as long as the text is."""
        given, divided = self._text
        if divided is None or given is not text_RTD:
            start, end = self._before, self._before + self.num_pictures
            parts = text_RTD.chunk(self.num_parts, dim=1)  # those of the other branches are all the same
            divided = torch.cat([parts[0][:start], *[part[start:end] for part in parts], parts[0][end:]])
            self._text = text_RTD, divided
        return divided

    def mixed(self, out: Tensor) -> Tensor:
        """(R, K, C) from the rows of cross-attention."""
        start, end = self._before, self._before + self.num_pictures * self.num_parts
        weights = shares(self.masks(self.cells)).flatten(1)[:, None, :, None].to(out.dtype)  # n 1 K 1
        prompts = out[start:end].unflatten(0, (self.num_parts, self.num_pictures))
        return torch.cat([out[:start], (weights * prompts).sum(dim=0), out[end:]])

    def _rows_of(self, part: int, like: Tensor) -> Tensor:
        rows = torch.zeros(len(like), *[1] * (like.ndim - 1), device=like.device, dtype=like.dtype)
        start = self._before + part * self.num_pictures
        rows[start : start + self.num_pictures] = 1
        return rows

    # --- what becomes of an addition of network number `part` ---

    def in_place(self, part: int, delta: Tensor) -> Tensor:
        """That of an ordinary layer: cells (R, C, h, w), tokens (R, K, C), or without places (R, C)."""
        if delta.ndim == 2:
            return delta / self.num_parts
        if delta.ndim == 4:
            return delta * self.masks((delta.shape[2], delta.shape[3]))[part].to(delta.dtype)
        return delta * self.masks(self.cells)[part].flatten()[:, None].to(delta.dtype)

    def in_text(self, part: int, delta: Tensor) -> Tensor:
        """That of keys and values of cross-attention."""
        return delta * self._rows_of(part, delta)

    def in_projection(self, part: int, delta: Tensor) -> Tensor:
        """That of the output of cross-attention, made larger by the sum that `mixed` divides by."""
        weight = total(self.masks(self.cells)).flatten()[:, None].to(delta.dtype)
        return delta * self._rows_of(part, delta) * weight


@contextmanager
def _known_cells(unet: Any, division: _Division) -> Iterator[None]:
    """Tell the division how many cells a transformer works on, which its tokens do not show."""

    def note(module: Any, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        x_BChw = args[0] if args else named["hidden_states"]
        division.cells = (x_BChw.shape[2], x_BChw.shape[3])

    transformers = [module for module in unet.modules() if type(module).__name__ == _TOKENS_OF]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in transformers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _DividedAttention:
    """diffusers' attention processor around another one, whose kernel and projections do the work."""

    def __init__(self, inner: Any, division: _Division) -> None:
        self._inner, self._division = inner, division

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        assert attention_mask is None, "text positions are never masked"
        queries, texts = self._division.spread(hidden_states), self._division.texts(encoder_hidden_states)
        return self._division.mixed(self._inner(attn, queries, encoder_hidden_states=texts))


@contextmanager
def _divided_attention(unet: Any, division: _Division) -> Iterator[None]:
    layers = [module for name, module in unet.named_modules() if name.rpartition(".")[2] == _CROSS]
    before = [layer.processor for layer in layers]
    try:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = _DividedAttention(processor, division)
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = processor


@contextmanager
def _weighed_additions(networks: Sequence[AdapterNetwork], division: _Division) -> Iterator[None]:
    adapters = [
        (adapter, _weighing(name, part, division))
        for part, network in enumerate(networks)
        for name, adapter in network.adapters.items()
        if network.targets[name].part == "unet"
    ]
    try:
        for adapter, weigh in adapters:
            adapter.region = weigh
        yield
    finally:
        for adapter, _ in adapters:
            adapter.region = None


def _weighing(name: str, part: int, division: _Division) -> Callable[[Tensor], Tensor]:
    """What becomes of the addition of network `part` to the layer that sd-scripts calls `name`."""
    if name.endswith((f"{_CROSS}_to_k", f"{_CROSS}_to_v")):
        weigh = division.in_text
    elif name.endswith(f"{_CROSS}_to_out_0"):
        weigh = division.in_projection
    else:
        weigh = division.in_place
    return lambda delta: weigh(part, delta)


@dataclass(frozen=True)
class Regions:
    """What a run says about networks that act in parts of its pictures: how many they are, and the picture of masks."""

    count: int
    pixels_HW3: Tensor
    color_codes: int | None

    def follower(self, unet: Any, networks: Sequence[AdapterNetwork]) -> Regional:
        """Its follower, for the networks that were loaded."""
        return Regional(unet, networks, self.pixels_HW3, color_codes=self.color_codes)


def read_regions(cfg: RunConfig) -> Regions | None:
    """The regions of a run, before any model is loaded; None for one whose networks act everywhere.

    Raises UserError for networks that cannot act in a part of a picture, and for a mask that is no picture or several.
    """
    count, codes = num_regional(cfg), cfg.regions.network_regional_mask_max_color_codes
    if not count:
        return None
    for module in cfg.generate.network_module[-count:]:
        if is_foreign(load_plugin("networks", module)):
            what = f"{module} acts everywhere: only networks of this suite can act in the parts of a picture"
            raise UserError(what, "network_module, mask_path", "merge it (network_merge_n_models), or remove mask_path")
    paths = picture_files([cfg.img2img.mask_path or ""], option="mask_path")
    if len(paths) > 1:
        what = f"mask_path names {len(paths)} pictures, and one says where the networks act"
        raise UserError(what, cfg.img2img.mask_path or "", "name a file")
    return Regions(count, torch.from_numpy(read_image(paths[0])), codes)
