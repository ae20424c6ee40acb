"""Encoded prompts: what a request's two branches say, kept on the CPU until it is drawn."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from library.diffusion.conditioning import TextCond
from library.inference.batch_invariance import batch_invariant
from library.inference.request import GenRequest, split_and
from library.log import get_logger
from library.models.bundle import ModelBundle
from library.models.families import sdxl
from library.models.tokenizers import CHUNK

logger = get_logger(__name__)

TEXTS_TOGETHER = 8  # texts in one call of the encoders on a CPU


@dataclass(frozen=True)
class TextForm:
    """How prompts become text conditions.

    "generate": as sd-scripts' generators do, 77 positions for each chunk of 75 tokens, as many chunks as a prompt or
    its negative needs, at most max_chunks; BREAK; weights keep the mean. "train": as training does, always
    max_chunks chunks in 75 n + 2 positions; weights without correction. balance: what else weights may keep when
    prompts are read as the generators do (text_encode.encode_text_gen).
    """

    kind: Literal["generate", "train"] = "generate"
    max_chunks: int = 1
    balance: str = "original"


# A text and the number of the network that acts while it is encoded; None: all that are there, _NO_NETWORK: none.
_Said = tuple[str, int | None]
_Key = tuple[_Said, tuple[_Said, ...], tuple[float, ...] | None]
_NO_NETWORK = -1


@dataclass
class Conditioning:
    """Text conditions of requests, one row each; equal ones are stored once.

    max_rows: how many `forget` leaves (None: all); those that were asked for longest ago go first.
    only: for networks that belong to the sub-prompts of a prompt ("a AND b"): a context in which that of one number is
    the only one in the text encoders. Each sub-prompt is encoded by itself then. None: a prompt is one text.
    pictures: pooled vectors (1, P) that take the place of a prompt's, by what is drawn over (`picture_key`).
    """

    form: TextForm
    rows: dict[_Key, TextCond] = field(default_factory=dict)
    max_rows: int | None = None
    only: Callable[[int], AbstractContextManager[None]] | None = None
    pictures: dict[str | int, Tensor] = field(default_factory=dict)

    def text(self, request: GenRequest, *, negative: bool = False) -> TextCond:
        """The row (1, T, D) and (1, P) of a request's prompt or negative prompt.

        With n sub-prompts (1, n T, D), one after the other, and the pooled vector of the last, as in sd-scripts; the
        negative prompt's positions stand there n times.
        """
        if negative:
            return self._repeated(request, request.negative)
        rows = [self.rows[self._key(request, said)] for said in self._prompts(request)]
        pooled = rows[-1].pooled_BP
        if request.image is not None:
            pooled = self.pictures.get(picture_key(request.image), pooled)
        return TextCond(torch.cat([row.hidden_BTD for row in rows], dim=1), pooled)

    def neutral(self, request: GenRequest) -> TextCond:
        """The row of the empty text, for a request with a negative_scale."""
        return self._repeated(request, "")

    def num_parts(self, request: GenRequest) -> int:
        """n of a request's rows: 1 where a prompt is one text."""
        return len(self._prompts(request))

    def num_positions(self, request: GenRequest) -> int:
        """T (or n T) of a request's rows. Prompts of one length need not be encoded yet."""
        if not self._pairs:
            return self.num_parts(request) * (CHUNK * self.form.max_chunks + 2)
        return self.text(request).hidden_BTD.shape[1]

    def layout(self, request: GenRequest) -> tuple[int, int]:
        """n and n T of a request's rows, which have to be equal in a batch: two long parts are as long as four short.

        Encoded or not, as `num_positions`.
        """
        return self.num_parts(request), self.num_positions(request)

    def holds(self, request: GenRequest) -> bool:
        """Whether all texts of a request are encoded; those count as asked for."""
        keys = [self._key(request, said) for said in self._branches(request)]
        for key in keys:
            if key in self.rows:
                self.rows[key] = self.rows.pop(key)
        return all(key in self.rows for key in keys)

    def add(self, bundle: ModelBundle, requests: Sequence[GenRequest]) -> None:
        """Encode what is not there yet, with the model as it is now; the requests agree in their networks' strengths.

        On a CPU some texts are encoded together, where each gets the bits that it has alone.
        """
        if self._pairs or self.only is not None:
            for request in requests:
                self._add_branches(bundle, request)
            return
        said = {self._key(request, one): one[0] for request in requests for one in self._branches(request)}
        missing = [(key, text) for key, text in said.items() if key not in self.rows]
        for _, text in missing:
            self._warn_if_cut(bundle, text)
        at_once = TEXTS_TOGETHER if bundle.text_encoder_1.device.type == "cpu" and self.form.max_chunks == 1 else 1
        for start in range(0, len(missing), at_once):
            group = missing[start : start + at_once]
            with batch_invariant(bundle.text_encoder_1, len(group), beside=[bundle.text_encoder_2]):
                encoded = self._encode(bundle, [text for _, text in group])
            for row, (key, _) in enumerate(group):
                self.rows[key] = encoded[row : row + 1]

    def _add_branches(self, bundle: ModelBundle, request: GenRequest) -> None:
        """Encode a request whose branches are as long as the longest, or have networks of their own."""
        every = list(dict.fromkeys(self._branches(request)))
        missing = [said for said in every if self._key(request, said) not in self.rows]
        for text, _ in missing:
            self._warn_if_cut(bundle, text)
        for number in dict.fromkeys(number for _, number in missing):
            alike = [said for said in missing if said[1] == number]
            together = [every] if self._pairs else [[said] for said in alike]
            for group in together:
                with nullcontext() if self.only is None or number is None else self.only(number):
                    encoded = self._encode(bundle, [text for text, _ in group])
                for row, said in enumerate(group):
                    if said in alike:
                        self.rows[self._key(request, said)] = encoded[row : row + 1]

    def forget(self, requests: Sequence[GenRequest]) -> None:
        """Drop what is more than max_rows and was asked for longest ago, but nothing that these requests say."""
        if self.max_rows is None or len(self.rows) <= self.max_rows:
            return
        needed = {self._key(request, said) for request in requests for said in self._branches(request)}
        for key in [key for key in self.rows if key not in needed][: len(self.rows) - self.max_rows]:
            del self.rows[key]

    @property
    def _pairs(self) -> bool:
        """Whether a prompt's number of chunks depends on its other branches and the other way round."""
        return self.form.kind == "generate" and self.form.max_chunks > 1

    def _key(self, request: GenRequest, said: _Said) -> _Key:
        return said, self._branches(request) if self._pairs else (), request.network_muls

    def _prompts(self, request: GenRequest) -> tuple[_Said, ...]:
        if self.only is None:
            return ((request.prompt, None),)
        return tuple((part, number) for number, part in enumerate(split_and(request.prompt)))

    def _branches(self, request: GenRequest) -> tuple[_Said, ...]:
        """What guidance needs: the prompt or its parts, its negative, and for a negative_scale the empty text."""
        prompts = self._prompts(request)
        if request.scale <= 1:
            return prompts
        texts = (request.negative, *([] if request.negative_scale is None else [""]))
        return (*prompts, *(self._background(text) for text in texts))

    def _background(self, text: str) -> _Said:
        return text, None if self.only is None else _NO_NETWORK

    def _repeated(self, request: GenRequest, text: str) -> TextCond:
        row = self.rows[self._key(request, self._background(text))]
        return TextCond(row.hidden_BTD.repeat(1, self.num_parts(request), 1), row.pooled_BP)

    def _encode(self, bundle: ModelBundle, words: Sequence[str]) -> TextCond:
        encoders = (bundle.text_encoder_1, bundle.text_encoder_2)
        if self.form.kind == "generate":
            how = {"max_chunks": self.form.max_chunks, "balance": self.form.balance}
            text = sdxl.encode_text_gen(*encoders, bundle.tokenizer, words, **how)
        else:
            length = CHUNK * self.form.max_chunks
            tokens = sdxl.tokenize(bundle.tokenizer, words, max_token_length=length, weighted=True)
            text = sdxl.encode_text(*encoders, tokens)
        return text.to("cpu")

    def _warn_if_cut(self, bundle: ModelBundle, text: str) -> None:
        # BREAK and weights take up room of their own or none; a prompt that just fits is not worth the exact count.
        tokens, room = len(bundle.tokenizer.encode(text)), CHUNK * self.form.max_chunks
        if tokens > room:
            option = "max_embeddings_multiples" if self.form.kind == "generate" else "max_token_length"
            logger.warning("a prompt has about %d tokens, of which %d are read (%s): %s", tokens, room, option, text)


def picture_key(picture: Any) -> str | int:
    """What tells the pictures of requests apart: a path, or which object it is."""
    return picture if isinstance(picture, str) else id(picture)
