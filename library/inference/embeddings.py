"""Words from embedding files in generation: `--textual_inversion_embeddings`, and those inside network files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from library.errors import UserError
from library.io.bundled import bundled
from library.io.checkpoint_file import read_checkpoint
from library.log import get_logger
from library.models.added_tokens import AddedTokens
from library.models.arch import SdxlArch
from library.models.bundle import ModelBundle
from library.models.embedding_files import Embedding, embedding_of, read_embedding

log = get_logger(__name__)

_WEIGHTS = re.compile(r"[()\[\]\\:]")  # what prompts use for weights


class Word(NamedTuple):
    """The vectors behind a word, and the file that they come from."""

    embedding: Embedding
    where: str


def read_words(files: Sequence[str], *, networks: Sequence[str] = ()) -> dict[str, Word]:
    """The words of embedding files, and of those inside network files; needs no model.

    A file's word is its name without the ending, in any case of letters. Raises UserError for files that are missing,
    broken or made for another kind of model, and for a word that stands for two embeddings.
    """
    found: dict[str, Word] = {}
    for path in files:
        _take(found, Path(path).stem, Word(read_embedding(path), path))
    for path in networks:
        for word, tensors in _inside(path).items():
            _take(found, word, Word(embedding_of(tensors, where=f"{path}, {word}"), path))
    return found


def _take(found: dict[str, Word], name: str, word: Word) -> None:
    for other, earlier in found.items():
        if other.lower() == name.lower():
            what = f"{name} is the word of two embeddings, the other one in {earlier.where}"
            raise UserError(what, word.where, "rename one of the files")
    if _WEIGHTS.search(name):
        raise UserError(f"{name} has signs in it that weights in prompts need", word.where, "rename the file")
    found[name] = word


def check_words(words: Mapping[str, Word], arch: SdxlArch) -> None:
    """Raise UserError for embeddings made for another model than one of `arch`; needs its header alone."""
    for embedding, where in words.values():
        embedding.check_widths(arch.text_widths, where=where)


def add_words(bundle: ModelBundle, words: Mapping[str, Word]) -> None:
    """Let the model's encoders and tokenizer know the words. Raises UserError for embeddings of another model."""
    check_words(words, bundle.arch)
    for name, (embedding, where) in words.items():
        vectors = "1 vector" if embedding.num_vectors == 1 else f"{embedding.num_vectors} vectors"
        log.info("%s: %s, from %s", name, vectors, where)
    if words:
        rows = AddedTokens({name: word.embedding for name, word in words.items()}).eval().requires_grad_(False)
        rows.to(device=bundle.text_encoder_1.device).install(bundle)


def _inside(path: str) -> dict:
    """The embeddings in a network file; third-party files may be of any kind, and are looked at as they are."""
    with read_checkpoint(path) as tensors:
        return bundled(tensors)
