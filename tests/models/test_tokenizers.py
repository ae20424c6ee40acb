"""Token ids, chunks and padding of both encoders, against known ids and against sd-scripts' re-cutting algorithm."""

import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from library.models import tokenizers
from library.models.tokenizers import ClipTokenizer, chunked, load_tokenizer

BOS, EOS = 49406, 49407


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return load_tokenizer()


@pytest.mark.parametrize(
    ("caption", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("a red circle", [320, 736, 7117]),
        ("A  Red\n circle ", [320, 736, 7117]),
        ("wow!", [2781, 256]),
        ("!!!", [995]),
        ("", []),
    ],
)
def test_known_ids(tokenizer: ClipTokenizer, caption: str, ids: list[int]):
    assert tokenizer.encode(caption) == ids


def test_many_captions_at_once_and_captions_of_any_length(tokenizer: ClipTokenizer):
    assert tokenizer.encode_all(["a red circle", "", "wow!"]) == [[320, 736, 7117], [], [2781, 256]]
    assert tokenizer.encode_all([]) == []
    assert tokenizer.encode("cat " * 300) == [2368] * 300


def test_the_vocabulary_has_clips_size_and_ends(tokenizer: ClipTokenizer):
    assert tokenizer.encode("<|startoftext|><|endoftext|>") == [BOS, EOS]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id_1, tokenizer.pad_id_2) == (BOS, EOS, EOS, 0)


@given(st.text(max_size=60))
def test_any_text_has_ids_inside_the_vocabulary(text: str):
    assert all(0 <= token <= EOS for token in load_tokenizer().encode(text))


@pytest.fixture(scope="module")
def reference() -> CLIPTokenizer:
    vocabulary, merges = tokenizers._vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges))


SAMPLES = [
    "1girl, (red eyes:1.2), [blurry], masterpiece_best",
    "Größe, naïve café 日本語 한국어 Ünïcödé ΑΒΓ ß İstanbul ǅ",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flags 👍🏽 🇩🇪 ❤️‍🔥",
    "tabs\tand\r\nlines\u2028\u3000\u00a0wide\u200bzero\ufeff",
    "control \x00\x01\x1f\x7f\x85 characters",
    "e\u0301 and \u00e9, \u1100\u1161\u11a8, \ufb01 ligature, \U0001d54f",
    "it's we've I'm they'll he'd don't IT'S",
    "<|startoftext|>a<|endoftext|> <|STARTOFTEXT|> < |endoftext|>",
    "1234567890 ½ ² Ⅷ ١٢٣",
    "!!! ?!?! ... --- ~~~ ```",
    "a" * 5000,
    "cat, " * 2000,
    " ",
    "\n",
    "\U0010ffff\ue000\ufffd",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_ids_are_those_of_transformers(tokenizer: ClipTokenizer, reference: CLIPTokenizer, text: str):
    assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"]


@given(st.lists(st.text(max_size=80), max_size=4))
def test_ids_of_any_texts_are_those_of_transformers(reference: CLIPTokenizer, texts: list[str]):
    expected = [reference(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert load_tokenizer().encode_all(texts) == expected


def test_workers_get_it_by_pickle(tokenizer: ClipTokenizer):
    data = pickle.dumps(tokenizer)
    assert len(data) < 500  # a recipe, not the vocabulary
    assert pickle.loads(data).encode("a red circle") == [320, 736, 7117]


def test_it_is_built_quickly():
    tokenizers._vocabulary.cache_clear()
    start = time.process_time()
    ClipTokenizer().encode("cat")
    assert time.process_time() - start < 0.3


def test_the_written_folder_gives_transformers_the_same_ids(folder):
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for caption in ("a photo of a cat", "Größe, naïve café 日本", "wow!", "it's 100% <3"):
        assert theirs(caption)["input_ids"] == [BOS, *load_tokenizer().encode(caption), EOS]
    assert theirs.pad_token_id == EOS and theirs.model_max_length == 77
    assert CLIPTokenizer.from_pretrained(folder / "tokenizer_2").pad_token_id == 0


def _recut(ids: list[int], *, num_chunks: int, pad_id: int) -> list[list[int]]:
    """sd-scripts' way (spec conditioning.md §2): one padded sequence, cut up again, end tokens mended."""
    length = 75 * num_chunks + 2
    whole = ([BOS, *ids[: length - 2], EOS] + [pad_id] * length)[:length]
    if num_chunks == 1:
        return [whole]
    rows = []
    for chunk in range(num_chunks):
        row = [whole[0], *whole[1 + 75 * chunk : 76 + 75 * chunk], whole[-1]]
        if pad_id != EOS:
            if row[-2] not in (EOS, pad_id):
                row[-1] = EOS
            if row[1] == pad_id:
                row[1] = EOS
        rows.append(row)
    return rows


@given(
    st.one_of(st.integers(0, 240), st.sampled_from([0, 74, 75, 76, 149, 150, 151, 224, 225, 226])), st.integers(1, 3)
)
def test_chunks_equal_sd_scripts_recut_sequence(count: int, num_chunks: int):
    ids = [1000 + number for number in range(count)]
    for pad_id in (EOS, 0):
        expected = _recut(ids, num_chunks=num_chunks, pad_id=pad_id)
        assert chunked(ids, num_chunks=num_chunks, pad_id=pad_id) == expected


def test_an_exclamation_mark_is_not_taken_for_padding():
    """Id 0 is padding for encoder 2 and also a piece of "!?"; the chunk keeps its tokens and its end."""
    assert chunked([0, 5], num_chunks=2, pad_id=0)[0][:4] == [BOS, 0, 5, EOS]
    assert chunked([7] * 74 + [0, 8], num_chunks=2, pad_id=0)[0][-2:] == [0, EOS]
