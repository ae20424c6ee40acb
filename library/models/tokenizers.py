"""CLIP's tokenizer, built from the bundled merges: no network, no downloads, no torch.

Both text encoders use the same vocabulary and differ in the padding only: encoder 1 is padded with the end token,
encoder 2 with id 0, which is also the piece "!". Padding is therefore done here by hand; a tokenizer whose pad token
is "!" would turn every "!" of a caption into padding.
"""

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from library.models.configs import BOS_ID, EOS_ID, PAD_ID_1, PAD_ID_2

CHUNK = 75  # caption tokens per chunk; with begin and end token the encoders see 77
WINDOW = CHUNK + 2
_MERGES_FILE = Path(__file__).parent / "tokenizer_data" / "bpe_simple_vocab_16e6.txt.gz"
FIRST_ADDED = EOS_ID + 1  # ids of words that are added to the vocabulary
_NUM_MERGES = 49152 - 256 - 2  # CLIP uses the first part of the file only
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Caption text to token ids, without begin and end token and without padding; can be pickled.

    added: words that the vocabulary does not have, in the order of their ids -> how many ids each stands for; the first
    is `FIRST_ADDED`. They are found in any case, as words of their own: not inside other words, unless they begin or
    end with a sign such as "<".
    """

    bos_id, eos_id = BOS_ID, EOS_ID
    pad_id_1, pad_id_2 = PAD_ID_1, PAD_ID_2

    def __init__(self, added: Mapping[str, int] | None = None) -> None:
        self._engine = _engine()
        self.added = dict(added or {})
        self._ids: dict[str, list[int]] = {}
        first = FIRST_ADDED
        for word, count in self.added.items():
            self._ids[word.lower()] = list(range(first, first + count))
            first += count
        words = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_as_word, words)), re.IGNORECASE) if words else None

    def ids_of(self, word: str) -> list[int]:
        """The ids of an added word."""
        return self._ids[word.lower()]

    def mentions(self, text: str) -> set[str]:
        """The added words that a text holds, in lower case."""
        return set() if self._pattern is None else {found.lower() for found in self._pattern.findall(text)}

    def encode(self, text: str) -> list[int]:
        """Token ids of one caption, of any length."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several captions, of any length."""
        if self._pattern is None or not any(map(self._pattern.search, texts)):
            return self._plain(texts)
        return [self._with_added(text) for text in texts]

    def _with_added(self, text: str) -> list[int]:
        assert self._pattern is not None
        words = [found.lower() for found in self._pattern.findall(text)]
        first, *rest = self._plain(self._pattern.split(text))
        return first + [i for word, ids in zip(words, rest, strict=True) for i in (*self._ids[word], *ids)]

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._engine.encode_batch(list(texts), add_special_tokens=False)]

    def __reduce__(self) -> tuple[Any, ...]:  # rebuilding is quicker than shipping 49,408 words to each worker
        return (ClipTokenizer, (self.added,)) if self.added else (load_tokenizer, ())


@cache
def load_tokenizer() -> ClipTokenizer:
    """The tokenizer of both text encoders, built once per process."""
    return ClipTokenizer()


def is_one_token(word: str) -> bool:
    """Whether the vocabulary of CLIP has the word, as a whole or as the beginning of words."""
    vocabulary, _ = _vocabulary()
    return word.lower() in vocabulary or len(load_tokenizer().encode(word)) == 1


def _as_word(word: str) -> str:
    start, end = (r"(?<!\w)" if word[0].isalnum() else "", r"(?!\w)" if word[-1].isalnum() else "")
    return start + re.escape(word) + end


def chunked(ids: Sequence[int], *, num_chunks: int, pad_id: int) -> list[list[int]]:
    """Cut caption ids into `num_chunks` windows of 77: begin token, up to 75 ids, end token, padding.

    What does not fit is cut off; chunks without ids hold begin token, end token, padding. Equal to sd-scripts'
    re-cutting of one padded sequence, for both padding rules.
    """
    rows = []
    for start in range(0, num_chunks * CHUNK, CHUNK):
        row = [BOS_ID, *ids[start : min(start + CHUNK, num_chunks * CHUNK)], EOS_ID]
        rows.append(row + [pad_id] * (WINDOW - len(row)))
    return rows


def write_tokenizer_folder(folder: Path, tokenizer: ClipTokenizer, *, pad_token: str) -> None:
    """Write vocab.json, merges.txt and their configuration in the layout that every transformers version reads."""
    vocabulary, merges = _vocabulary()
    folder.mkdir(parents=True)
    _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    special = {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _END, "pad_token": pad_token}
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": WINDOW, "add_prefix_space": False}
    _write(
        folder / "tokenizer_config.json", json.dumps({**config, "do_lower_case": True, "errors": "replace"}, indent=2)
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text + ("" if text.endswith("\n") else "\n"), encoding="utf-8", newline="\n")


@cache
def _vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Word -> id for the 49,408 pieces, and the merges in order.

    Order of the ids, from CLIP: 256 bytes, the same bytes as word ends, the results of the merges, begin, end.
    """
    lines = gzip.decompress(_MERGES_FILE.read_bytes()).decode("utf-8").split("\n")
    merges: list[tuple[str, str]] = []
    for line in lines[1 : _NUM_MERGES + 1]:
        first, second = line.split()
        merges.append((first, second))
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), _BEGIN, _END]
    vocabulary = {word: index for index, word in enumerate(words)}
    assert len(vocabulary) == EOS_ID + 1, len(vocabulary)
    return vocabulary, tuple(merges)


@cache
def _engine() -> Tokenizer:
    """The steps of transformers' CLIPTokenizer, which cannot be imported without torch; nothing of it ever changes."""
    vocabulary, merges = _vocabulary()
    model = BPE(vocabulary, list(merges), end_of_word_suffix="</w>", unk_token=_END)
    engine = Tokenizer(model)
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    engine.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in (_BEGIN, _END)])
    return engine


def _byte_letters() -> list[str]:
    """A visible character for each byte, in CLIP's order: printable Latin-1 for itself, the rest moved above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
