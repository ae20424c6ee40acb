"""What new tokens start from, what they are trained with, and how their lengths are kept."""

import logging

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.config.cli import make_config
from library.config.dataset_file import dataset_specs
from library.data.captions import process_caption
from library.data.dataset import build_train_data
from library.errors import UserError
from library.models.added_tokens import token_table
from library.models.checkpoint import load_bundle
from library.models.tokenizers import load_tokenizer
from library.training import naming
from library.training.new_tokens import NewTokens, mean_norm
from library.training.token_files import TokenWriter, WithTokens


@pytest.fixture(scope="module")
def base():
    return load_bundle("tiny", parts=("text_encoders",))


@pytest.fixture
def bundle(base):
    """The tiny model's encoders; their lookup is put back afterwards."""
    tokenizer = base.tokenizer
    yield base
    base.tokenizer = tokenizer
    for name in ("clip_l", "clip_g"):
        vars(token_table(base, name)).pop("forward", None)


@pytest.fixture
def config(tmp_path):
    """config(**options): of a textual inversion run over three pictures, two of which name zxq."""
    folder = tmp_path / "images" / "2_thing"
    folder.mkdir(parents=True)
    for name, text in {"a": "a zxq cup", "b": "ZXQ, red", "c": "a cup"}.items():
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)
    fixed = {
        "pretrained_model_name_or_path": "tiny", "train_data_dir": str(tmp_path / "images"), "resolution": 64,
        "caption_extension": ".txt", "output_dir": str(tmp_path / "out"), "token_string": "zxq",
    }  # fmt: skip
    return lambda **options: make_config("sdxl_train_textual_inversion", **{**fixed, **options})


def started(config, bundle, *, seed=1, **options):
    tokens = NewTokens(config(**options))
    tokens.install(bundle, seed=seed)
    return tokens


def test_words_are_the_start_and_repeat(config, bundle, caplog):
    with caplog.at_level(logging.INFO):
        tokens = started(config, bundle, init_word="red star", num_vectors_per_token=3)
    ids = load_tokenizer().encode("red star")
    for name in ("clip_l", "clip_g"):
        table = token_table(bundle, name).weight
        assert torch.equal(getattr(tokens.rows, name), table[[*ids, ids[0]]])
    assert 'init_word "red star" is 2 token(s) for 3 vectors of zxq' in caplog.text


def test_words_of_more_tokens_than_vectors_are_told(config, caplog):
    with caplog.at_level(logging.WARNING):
        NewTokens(config(init_word="red star"))
    assert "the first 1 count; num_vectors_per_token 2 would take all of them" in caplog.text


def test_a_random_start_has_the_mean_length_and_follows_seed_and_name(config, bundle):
    first, again = started(config, bundle), started(config, bundle)
    assert torch.equal(first.rows.clip_g, again.rows.clip_g)
    norm = first.rows.clip_g.norm(dim=1)
    assert norm.item() == pytest.approx(token_table(bundle, "clip_g").weight.norm(dim=1).mean().item(), rel=1e-4)
    assert not torch.equal(first.rows.clip_g, started(config, bundle, seed=2).rows.clip_g)
    assert not torch.equal(first.rows.clip_g, started(config, bundle, token_string="qwy").rows.clip_g)


def test_a_file_is_the_start(config, bundle, tmp_path):
    path, widths = str(tmp_path / "other.safetensors"), bundle.text_widths
    stored = {name: torch.randn(2, width) for name, width in zip(("clip_l", "clip_g"), widths, strict=True)}
    save_file(stored, path)
    tokens = started(config, bundle, weights=path)
    assert torch.equal(tokens.rows.clip_l, stored["clip_l"]) and tokens.counts == {"zxq": 2}
    tokens = started(config, bundle, init_word=path, num_vectors_per_token=3)
    assert torch.equal(tokens.rows.clip_l, stored["clip_l"][[0, 1, 0]])
    with pytest.raises(UserError, match="holds 2 vectors, and num_vectors_per_token is 3"):
        NewTokens(config(weights=path, num_vectors_per_token=3))
    save_file({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, path)
    with pytest.raises(UserError, match="made for another model"):
        started(config, bundle, weights=path)


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_lengths_move_towards_those_of_the_vocabulary(config, bundle, decay):
    tokens = started(config, bundle, init_word="red star", num_vectors_per_token=2, token_norm_decay=decay)
    with torch.no_grad():
        tokens.rows.clip_g.mul_(3.0)
    before, mean = tokens.rows.clip_g.detach().clone(), mean_norm(token_table(bundle, "clip_g").weight)
    logged = tokens.after_step()
    norms = before.norm(dim=1)
    expected = norms + decay * (mean - norms)
    assert torch.allclose(tokens.rows.clip_g.norm(dim=1), expected, rtol=1e-5)
    cosine = torch.cosine_similarity(tokens.rows.clip_g, before)
    assert torch.allclose(cosine, torch.ones(2), atol=1e-5)
    assert logged["tokens/norm_clip_g"].item() == pytest.approx(expected.mean().item(), rel=1e-5)


def served(cfg, tokens):
    return build_train_data(tokens.fit_data(dataset_specs(cfg)), seed=1)


def test_captions_without_the_token_are_named(config, caplog):
    cfg = config()
    tokens = NewTokens(cfg)
    with caplog.at_level(logging.WARNING):
        tokens.check_data(served(cfg, tokens))
    (line,) = [record.message for record in caplog.records if "captions hold no new token" in record.message]
    assert line.startswith("1 of 3 captions") and line.endswith("c.png")


def test_a_token_that_no_caption_has_is_an_error(config, tmp_path):
    cfg = config(token_string="qwy")
    tokens = NewTokens(cfg)
    with pytest.raises(UserError, match="none of the 3 captions holds the token qwy"):
        tokens.check_data(served(cfg, tokens))
    table = tmp_path / "tokens.toml"
    table.write_text("[tokens.zxq]\n[tokens.qwy]\n")
    cfg = config(token_string=None, token_file=str(table))
    with pytest.raises(UserError, match="the token qwy") as caught:
        NewTokens(cfg).check_data(served(cfg, NewTokens(cfg)))
    assert caught.value.problems[0].where.endswith("tokens.toml line 2")
    cfg = config(token_string="qwy", caption_prefix="qwy")
    NewTokens(cfg).check_data(served(cfg, NewTokens(cfg)))


def test_templates_take_the_place_of_captions_but_not_of_regularisation(config, tmp_path):
    (tmp_path / "reg" / "1_cup").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "reg" / "1_cup" / "r.png")
    cfg = config(use_style_template=True, reg_data_dir=str(tmp_path / "reg"), token_string="qwy")
    tokens = NewTokens(cfg)
    data = served(cfg, tokens)
    tokens.check_data(data)  # no caption has qwy, every sentence does
    batches = [batch for epoch in range(3) for group in data.epoch(epoch) for batch in group.micro_batches]
    texts = {key.record: set() for batch in batches for key in batch.keys}
    for batch in batches:
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            texts[key.record].add(caption)
    assert texts.pop("1_cup/r.png") == {"cup"}
    assert all("qwy" in text and "{}" not in text for found in texts.values() for text in found)
    assert max(map(len, texts.values())) > 1, "sentences change from visit to visit"
    again = [batch.captions for group in data.epoch(2) for batch in group.micro_batches]
    assert again == [batch.captions for batch in batches][-len(again) :]


def test_a_dropped_caption_takes_no_template():
    import random

    from library.config.dataset_file import SubsetSpec

    subset = SubsetSpec("x", templates=("a zxq",), caption_dropout_rate=1.0)
    assert process_caption("a cup", subset, rng=random.Random(1), epoch=1) == ""
    subset = SubsetSpec("x", templates=("a zxq",))
    assert process_caption("a cup", subset, rng=random.Random(1), epoch=1) == "a zxq"


def test_a_file_of_pytorch_is_written_on_request(config, bundle, tmp_path):
    tokens = started(config, bundle)
    writer = TokenWriter(tokens, dtype=None, cfg=config(save_model_as="pt"), bundle=bundle)
    path = naming.Names(tmp_path / "out", "zxq", writer.extension).model("zxq")
    writer(path, None)
    assert path.name == "zxq.pt"
    assert torch.equal(torch.load(path, weights_only=True)["clip_g"], tokens.rows.clip_g)


def test_several_tokens_are_a_file_each(config, bundle, tmp_path):
    table = tmp_path / "tokens.toml"
    table.write_text('[tokens.zxq]\ninit_word = "red"\n[tokens.qwy]\ninit_word = "blue"\nnum_vectors_per_token = 2\n')
    cfg = config(token_string=None, token_file=str(table), metadata_author="me")
    tokens = NewTokens(cfg)
    tokens.install(bundle, seed=1)
    writer = TokenWriter(tokens, dtype=torch.float16, cfg=cfg, bundle=bundle)
    names = naming.Names(tmp_path / "out", None, writer.extension)
    writer(names.model(names.last_stem()), None)
    first = load_file(tmp_path / "out" / "last" / "zxq.safetensors")
    second = load_file(tmp_path / "out" / "last" / "qwy.safetensors")
    assert {name: value.dtype for name, value in first.items()} == dict.fromkeys(("clip_l", "clip_g"), torch.float16)
    assert torch.equal(second["clip_g"], tokens.rows.clip_g[1:].half()) and len(second["clip_l"]) == 2
    written = []
    WithTokens(lambda path, view: written.append(path), writer)(tmp_path / "out" / "net.safetensors", None)
    assert written and (tmp_path / "out" / "net-tokens" / "qwy.safetensors").is_file()
