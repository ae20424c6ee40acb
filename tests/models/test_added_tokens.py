"""Words added to the vocabulary: found in text, looked up beside the vocabulary, which stays as it is."""

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional

from library.errors import UserError
from library.models.added_tokens import AddedTokens, token_table
from library.models.embedding_files import Embedding, embedding_of, read_embedding
from library.models.families import sdxl
from library.models.token_ids import count_tokens
from library.models.tokenizers import FIRST_ADDED, ClipTokenizer, load_tokenizer

KNOWS = ClipTokenizer({"zxq": 3, "<a.b>": 1})
ZXQ, AB = [FIRST_ADDED, FIRST_ADDED + 1, FIRST_ADDED + 2], [FIRST_ADDED + 3]


def embedding(widths, count, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Embedding(*(torch.randn(count, width, generator=g) for width in widths))


def test_a_word_stands_for_all_its_vectors_in_any_case():
    plain = load_tokenizer().encode
    assert KNOWS.encode("a ZXQ, red") == [*plain("a"), *ZXQ, *plain(", red")]
    assert KNOWS.encode("zxq zxq") == ZXQ + ZXQ
    assert KNOWS.encode("my<A.B>cat") == [*plain("my"), *AB, *plain("cat")]
    assert KNOWS.mentions("Zxq and <a.b>") == {"zxq", "<a.b>"}
    assert count_tokens(KNOWS, ["a zxq cat", "a cat"]) == [5, 2]


@pytest.mark.parametrize("text", ["zxqs", "azxq", "zxq1", "éзzxq", "z xq", "<a b>"])
def test_a_word_is_not_found_inside_others(text):
    assert KNOWS.encode(text) == load_tokenizer().encode(text)


@given(st.text(max_size=20), st.text(max_size=20))
def test_text_around_a_word_is_read_as_without_it(before, after):
    ids = KNOWS.encode(f"{before} zxq {after}")
    # Outside the word nothing may become an added id; "zxq" itself cannot be drawn here with its neighbours.
    assert [i for i in ids if i >= FIRST_ADDED][:3] == ZXQ
    others = [i for i in ids if i < FIRST_ADDED]
    if "zxq" not in (before + after).lower() and "<a.b>" not in (before + after).lower():
        assert others == load_tokenizer().encode(before) + load_tokenizer().encode(after)


def test_a_tokenizer_with_words_travels_to_workers():
    assert pickle.loads(pickle.dumps(KNOWS)).encode("a zxq") == KNOWS.encode("a zxq")


def test_lookup_is_that_of_one_longer_table_and_only_its_new_rows_learn(fresh_bundle):
    bundle = fresh_bundle
    before = {name: tensor.clone() for name, tensor in bundle.text_encoder_2.state_dict().items()}
    for part in (bundle.text_encoder_1, bundle.text_encoder_2):
        part.requires_grad_(False)
    rows = AddedTokens({"zxq": embedding(bundle.text_widths, 2)})
    rows.install(bundle)
    tokens = sdxl.tokenize(bundle.tokenizer, ["a zxq cat", "a red cat"])
    assert (tokens.ids_1_BnL >= FIRST_ADDED).sum() == 2
    text = sdxl.encode_text(bundle.text_encoder_1, bundle.text_encoder_2, tokens)
    text.hidden_BTD.square().mean().backward()
    assert rows.clip_l.grad.abs().min() > 0 and rows.clip_g.grad.abs().min() > 0
    for name in ("clip_l", "clip_g"):
        table = token_table(bundle, name)
        assert table.weight.grad is None and table.num_embeddings == FIRST_ADDED
        ids = tokens.ids_2_BnL[:, 0]
        whole = torch.cat([table.weight, getattr(rows, name)])
        assert torch.equal(table(ids), functional.embedding(ids, whole))
    after = bundle.text_encoder_2.state_dict()
    assert list(after) == list(before) and all(torch.equal(before[name], after[name]) for name in before)


def test_a_vector_of_a_word_means_the_word(fresh_bundle):
    """A token that has the vector of "red" gives the text condition of "red", pooled vector and all."""
    plain = sdxl.encode_text(
        fresh_bundle.text_encoder_1, fresh_bundle.text_encoder_2, sdxl.tokenize(load_tokenizer(), ["a red star"])
    )
    (red,) = load_tokenizer().encode("red")
    vectors = [token_table(fresh_bundle, name).weight[[red]].detach() for name in ("clip_l", "clip_g")]
    AddedTokens({"zxq": Embedding(*vectors)}).install(fresh_bundle)
    tokens = sdxl.tokenize(fresh_bundle.tokenizer, ["a zxq star"])
    same = sdxl.encode_text(fresh_bundle.text_encoder_1, fresh_bundle.text_encoder_2, tokens)
    assert torch.equal(plain.hidden_BTD, same.hidden_BTD) and torch.equal(plain.pooled_BP, same.pooled_BP)


def test_gradient_checkpointing_changes_no_gradient(fresh_bundle):
    from library.models import memory

    rows = AddedTokens({"zxq": embedding(fresh_bundle.text_widths, 1)})
    rows.install(fresh_bundle)
    memory.freeze(fresh_bundle)
    grads = []
    for _ in range(2):
        rows.zero_grad()
        tokens = sdxl.tokenize(fresh_bundle.tokenizer, ["a zxq cat"])
        text = sdxl.encode_text(fresh_bundle.text_encoder_1, fresh_bundle.text_encoder_2, tokens)
        (text.hidden_BTD.square().mean() + text.pooled_BP.square().mean()).backward()
        grads.append((rows.clip_l.grad.clone(), rows.clip_g.grad.clone()))
        memory.enable_gradient_checkpointing(fresh_bundle, text_encoders=True)
        fresh_bundle.text_encoder_1.train()
        fresh_bundle.text_encoder_2.train()
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


L, G = torch.randn(2, 768), torch.randn(2, 1280)
LAYOUTS = {
    "sd-scripts": {"clip_l": L, "clip_g": G},
    "an older diffusers script": {"text_encoders_0": L, "text_encoders_1": G},
    "string_to_param": {"string_to_token": {"*": 265}, "string_to_param": {"clip_l": L, "clip_g": G}, "step": 7},
    "inside a network": {"string_to_param.clip_l": L, "string_to_param.clip_g": G},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout, tmp_path):
    content = LAYOUTS[layout]
    found = embedding_of(content, where="")
    assert torch.equal(found.clip_l, L) and torch.equal(found.clip_g, G)
    torch.save(content, tmp_path / "e.pt")
    assert torch.equal(read_embedding(tmp_path / "e.pt").clip_g, G)
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        save_file(content, tmp_path / "e.safetensors")
        assert torch.equal(read_embedding(tmp_path / "e.safetensors").clip_l, L)


class Unsafe:
    """Runs code when it is unpickled by a loader that allows it."""

    def __reduce__(self):
        return (Path.touch, (Path("opened"),))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"string_to_param": {"*": torch.zeros(1, 768)}}, r"one text encoder \(\*\), as those of Stable Diffusion 1.x"),
        ({"emb": torch.zeros(1, 1024)}, "as those of Stable Diffusion 2.x are"),
        ({"clip_l": L}, r"one text encoder \(clip_l\)"),
        ({"clip_l": L, "clip_g": G[:1]}, "clip_l has 2 vectors and clip_g 1"),
        ({"clip_l": L, "clip_g": G * float("nan")}, "not finite"),
        ({"a": L, "b": G}, "no embedding for SDXL"),
        ({"clip_l": L, "clip_g": G, "more": Unsafe()}, "could run code"),
        ([L, G], "no embedding for SDXL"),
    ],
)
def test_files_that_are_no_embedding_for_sdxl_are_refused(content, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "e.pt")
    with pytest.raises(UserError, match=what):
        read_embedding(tmp_path / "e.pt")
    assert not (tmp_path / "opened").exists()


def test_an_embedding_for_another_width_is_refused():
    with pytest.raises(
        UserError, match=r"vectors of 768 and 1280 numbers, this model's have 32 and 48: .* another model"
    ):
        Embedding(L, G).check_widths((32, 48), where="e.pt")


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_file_that_is_cut_short_is_refused(name, tmp_path):
    if name.endswith(".pt"):
        torch.save({"clip_l": L, "clip_g": G}, tmp_path / name)
    else:
        save_file({"clip_l": L, "clip_g": G}, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError):
        read_embedding(tmp_path / name)
