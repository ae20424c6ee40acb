"""Encoded prompts: what a request's two branches say, kept on the CPU until it is drawn."""

from dataclasses import dataclass, field
from typing import Literal

from library.diffusion.conditioning import TextCond
from library.inference.request import GenRequest
from library.log import get_logger
from library.models.bundle import ModelBundle
from library.models.families import sdxl
from library.models.tokenizers import CHUNK

logger = get_logger(__name__)


@dataclass(frozen=True)
class TextForm:
    """How prompts become text conditions.

    "generate": as sd-scripts' generators do, 77 positions for each chunk of 75 tokens, as many chunks as a prompt or
    its negative needs, at most max_chunks; BREAK; weights keep the mean. "train": as training does, always
    max_chunks chunks in 75 n + 2 positions; weights without correction.
    """

    kind: Literal["generate", "train"] = "generate"
    max_chunks: int = 1


_Key = tuple[str, tuple[str, ...], tuple[float, ...] | None]


@dataclass
class Conditioning:
    """Text conditions of requests, one row each; equal ones are stored once.

    max_rows: how many are kept (None: all); those that were asked for longest ago go first.
    """

    form: TextForm
    rows: dict[_Key, TextCond] = field(default_factory=dict)
    max_rows: int | None = None

    def text(self, request: GenRequest, *, negative: bool = False) -> TextCond:
        """The row (1, T, D) and (1, P) of a request's prompt or negative prompt."""
        return self.rows[self._key(request, request.negative if negative else request.prompt)]

    def neutral(self, request: GenRequest) -> TextCond:
        """The row of the empty text, for a request with a negative_scale."""
        return self.rows[self._key(request, "")]

    def num_positions(self, request: GenRequest) -> int:
        """T of a request's rows: only equal ones go into one batch. Prompts of one length need not be encoded yet."""
        if not self._pairs:
            return CHUNK * self.form.max_chunks + 2
        return self.text(request).hidden_BTD.shape[1]

    def holds(self, request: GenRequest) -> bool:
        """Whether all texts of a request are encoded; those count as asked for."""
        keys = [self._key(request, words) for words in _branches(request)]
        for key in keys:
            if key in self.rows:
                self.rows[key] = self.rows.pop(key)
        return all(key in self.rows for key in keys)

    def add(self, bundle: ModelBundle, request: GenRequest) -> None:
        """Encode what is not there yet, with the model as it is now."""
        keys = {self._key(request, words): words for words in _branches(request)}
        if self._pairs:
            if not keys.keys() <= self.rows.keys():
                both = self._encode(bundle, list(keys.values()))
                self.rows |= {key: both[row : row + 1] for row, key in enumerate(keys)}
        else:
            for key, words in keys.items():
                if key not in self.rows:
                    self.rows[key] = self._encode(bundle, [words])
        while self.max_rows is not None and len(self.rows) > self.max_rows:
            del self.rows[next(iter(self.rows))]

    @property
    def _pairs(self) -> bool:
        """Whether a prompt's number of chunks depends on its other branches and the other way round."""
        return self.form.kind == "generate" and self.form.max_chunks > 1

    def _key(self, request: GenRequest, words: str) -> _Key:
        return words, _branches(request) if self._pairs else (), request.network_muls

    def _encode(self, bundle: ModelBundle, words: list[str]) -> TextCond:
        for text in words:
            self._warn_if_cut(bundle, text)
        encoders = (bundle.text_encoder_1, bundle.text_encoder_2)
        if self.form.kind == "generate":
            text = sdxl.encode_text_gen(*encoders, bundle.tokenizer, words, max_chunks=self.form.max_chunks)
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


def _branches(request: GenRequest) -> tuple[str, ...]:
    """The texts that guidance needs: the prompt, its negative, and for a negative_scale the empty one."""
    if request.scale <= 1:
        return (request.prompt,)
    return (request.prompt, request.negative, *([] if request.negative_scale is None else [""]))
