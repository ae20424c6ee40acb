"""The cache tools as users start them, with the tiny model."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from library.config.cli import make_config
from library.config.dataset_file import dataset_specs
from library.data.dataset import build_train_data
from library.data.latent_caching import posterior_noise
from library.data.transforms import read_record
from library.inference import encode_pass
from library.io import latent_cache, text_cache
from library.models.checkpoint import load_bundle
from library.models.families import sdxl
from tests.data.samples import load_sample
from tests.data.specs import write_folder, write_picture
from tests.ranks import two_ranks

ROOT = Path(__file__).resolve().parents[2]
NUM = 7
TEXT = "cache_text_encoder_outputs"


def tool(name):
    """The module of a tool; tools/ is no package that tests could import by name from anywhere."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path):
    """A trainer's settings file for seven pictures, one image that is none, and a caption prefix."""
    folder = write_folder(tmp_path / "train" / "2_cat")
    (folder / "broken.png").write_bytes(b"broken")
    lines = [
        'pretrained_model_name_or_path = "tiny"',
        f"train_data_dir = '{tmp_path / 'train'}'",
        f"output_dir = '{tmp_path / 'out'}'",
        'output_name = "test"',
        'network_module = "networks.lora"',
        'caption_extension = ".txt"',
        'caption_prefix = "photo,"',
        'resolution = "64,64"',
        "enable_bucket = true",
        "min_bucket_reso = 32",
        "max_bucket_reso = 128",
        "bucket_reso_steps = 32",
        "vae_batch_size = 2",
    ]
    path = tmp_path / "run.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run(name, config, capsys, *arguments):
    """The last line that a tool prints; it has to succeed."""
    capsys.readouterr()
    assert tool(name).main(["--config_file", str(config), *arguments]) == 0
    return capsys.readouterr().out.strip().splitlines()[-1]


def pictures(config):
    return config.parent / "train" / "2_cat"


def test_latents_are_built_kept_and_rebuilt(config, capsys):
    assert run("cache_latents", config, capsys) == "built 7, reused 0, stale 0, failed 0"
    assert run("cache_latents", config, capsys) == "built 0, reused 7, stale 0, failed 0"
    write_picture(pictures(config) / "p0.png", 64, 64, seed=50)
    assert run("cache_latents", config, capsys) == "built 1, reused 6, stale 1, failed 0"
    assert run("cache_latents", config, capsys, "--flip_aug") == "built 7, reused 0, stale 7, failed 0"
    assert run("cache_latents", config, capsys, "--resolution", "96,96") == "built 7, reused 0, stale 7, failed 0"
    (pictures(config) / "p2.png").write_bytes((pictures(config) / "p2.png").read_bytes()[:300])
    assert run("cache_latents", config, capsys, "--resolution", "96,96") == "built 0, reused 6, stale 1, failed 1"


def test_a_share_for_validation_is_cached_like_the_rest(config, capsys):
    """A training run with another seed holds out other images and needs their mirror images."""
    flags = ["--flip_aug", "--validation_split", "0.5"]
    assert run("cache_latents", config, capsys, *flags) == "built 7, reused 0, stale 0, failed 0"
    assert run("cache_latents", config, capsys, "--flip_aug") == "built 0, reused 7, stale 0, failed 0"


def test_masks_are_cached_by_the_tool(config, capsys):
    assert run("cache_latents", config, capsys) == "built 7, reused 0, stale 0, failed 0"
    assert run("cache_latents", config, capsys, "--alpha_mask") == "built 7, reused 0, stale 7, failed 0"
    assert run("cache_latents", config, capsys, "--alpha_mask") == "built 0, reused 7, stale 0, failed 0"
    assert run("cache_latents", config, capsys) == "built 0, reused 7, stale 0, failed 0"


def test_captions_are_built_kept_and_rebuilt(config, capsys):
    assert run(TEXT, config, capsys) == "built 7, reused 0, stale 0, failed 0"
    assert run(TEXT, config, capsys) == "built 0, reused 7, stale 0, failed 0"
    (pictures(config) / "p1.txt").write_text("a dog", encoding="utf-8")
    assert run(TEXT, config, capsys) == "built 1, reused 6, stale 1, failed 0"
    assert run(TEXT, config, capsys, "--max_token_length", "150") == "built 7, reused 0, stale 7, failed 0"


def test_several_wordings_of_a_caption_are_built_kept_and_rebuilt(config, capsys):
    varied = ["--shuffle_caption", "--text_cache_variants", "3"]
    assert tool(TEXT).main(["--config_file", str(config), "--shuffle_caption"]) == 2
    assert "set text_cache_variants" in capsys.readouterr().err
    assert run(TEXT, config, capsys, *varied) == "built 7, reused 0, stale 0, failed 0"
    assert run(TEXT, config, capsys, *varied) == "built 0, reused 7, stale 0, failed 0"
    assert run(TEXT, config, capsys, *varied, "--keep_tokens", "2") == "built 7, reused 0, stale 7, failed 0"
    assert run("cache_latents", config, capsys, *varied) == "built 7, reused 0, stale 0, failed 0"


def test_an_interrupted_tool_goes_on_where_it_stopped(config, capsys, monkeypatch):
    calls = []
    encode_image = sdxl.encode_image

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return encode_image(*arguments)

    monkeypatch.setattr(sdxl, "encode_image", interrupted)
    assert tool("cache_latents").main(["--config_file", str(config)]) == 130
    built = len(list(pictures(config).glob("*_sdxl.npz")))
    assert 0 < built < NUM
    monkeypatch.setattr(sdxl, "encode_image", encode_image)
    assert run("cache_latents", config, capsys) == f"built {NUM - built}, reused {built}, stale 0, failed 0"


def test_bad_input_is_a_sentence_and_exit_code_2(config, capsys):
    shutil.rmtree(pictures(config))
    pictures(config).mkdir()
    assert tool("cache_latents").main(["--config_file", str(config)]) == 2
    assert str(pictures(config)) in capsys.readouterr().err


def test_two_processes_write_what_one_writes(config, capsys):
    printed = two_ranks("tools.cache_latents", ["--config_file", str(config)], config.parent)
    assert "".join(printed).strip().splitlines() == ["built 7, reused 0, stale 0, failed 0"]
    together = {path.name: path.read_bytes() for path in pictures(config).glob("*.npz")}
    assert run("cache_latents", config, capsys) == "built 0, reused 7, stale 0, failed 0"
    for path in pictures(config).glob("*.npz"):
        path.unlink()
    assert run("cache_latents", config, capsys) == "built 7, reused 0, stale 0, failed 0"
    assert {path.name: path.read_bytes() for path in pictures(config).glob("*.npz")} == together


@pytest.fixture(scope="module")
def bundle():
    return load_bundle("tiny", parts=("text_encoders", "vae"))


def data_of(config, **changes):
    flat = {
        "pretrained_model_name_or_path": "tiny",
        "train_data_dir": str(config.parent / "train"),
        "output_dir": str(config.parent / "out"),
        "output_name": "test",
        "network_module": "networks.lora",
        "caption_extension": ".txt",
        "caption_prefix": "photo,",
        "resolution": "64,64",
        "enable_bucket": True,
        "min_bucket_reso": 32,
        "max_bucket_reso": 128,
        "bucket_reso_steps": 32,
    }
    cfg = make_config("sdxl_train_network", **(flat | changes))
    return cfg, build_train_data(dataset_specs(cfg), seed=1)


def test_cached_latents_are_what_the_vae_gives(config, bundle):
    cfg, data = data_of(config, cache_latents=True, cache_latents_to_disk=True, vae_batch_size=3)
    store, _ = encode_pass.cache_latents_pass(bundle, data, cfg=cfg, device="cpu")
    for row, image in enumerate(data.table):
        pixels_3HW, _ = load_sample(read_record(image.record), image.placement)
        expected = sdxl.encode_image(bundle.vae, pixels_3HW[None], posterior_noise([image], "plain"))[0]
        assert torch.allclose(store.get(row, flipped=False).latents_4hw, expected, atol=1e-4)
        path = latent_cache.latent_cache_path(image.record.path, image.record.size)
        assert latent_cache.read(path).flipped_4hw is None


def test_cached_text_is_what_the_encoders_give(config, bundle):
    cfg, data = data_of(
        config,
        cache_text_encoder_outputs=True,
        cache_text_encoder_outputs_to_disk=True,
        network_train_unet_only=True,
    )
    store, _ = encode_pass.cache_text_pass(bundle, data, cfg=cfg, device="cpu")
    rows = [(f"photo, {record.caption}", store.get(image)) for image, record in enumerate(data.records)]
    for caption, row in [("", store.empty), *rows]:
        tokens = sdxl.tokenize(bundle.tokenizer, [caption])
        expected = sdxl.encode_text(bundle.text_encoder_1, bundle.text_encoder_2, tokens)
        assert torch.allclose(row.hidden_BTD, expected.hidden_BTD, atol=1e-4)
        assert torch.allclose(row.pooled_BP, expected.pooled_BP, atol=1e-4)
    entry = text_cache.read(text_cache.text_cache_path(data.records[0].path))
    widths = (entry.hidden_state1.shape[1], entry.hidden_state2.shape[1])
    assert widths == bundle.text_widths and entry.hidden_state1.shape[0] == 77


def test_a_latents_pass_drops_what_it_cannot_encode(config, bundle):
    cfg, data = data_of(config, cache_latents=True)
    (pictures(config) / "p2.png").write_bytes((pictures(config) / "p2.png").read_bytes()[:300])
    store, report = encode_pass.cache_latents_pass(bundle, data, cfg=cfg, device="cpu")
    assert len(report.failed) == 1 and len(data.records) == NUM - 1
    data.attach_latents(store)
    served = {key.record for group in data.epoch(0) for batch in group.micro_batches for key in batch.keys}
    assert served == {record.key for record in data.records}
    assert np.isfinite(next(data.epoch(0)).micro_batches[0].latents_B4hw.numpy()).all()


def test_the_tools_fill_a_packed_cache_that_is_found_again(config, capsys, monkeypatch):
    flags = ["--cache_store", "packed"]
    for name in ("cache_latents", TEXT):
        assert run(name, config, capsys, *flags) == "built 7, reused 0, stale 0, failed 0"
        assert run(name, config, capsys, *flags) == "built 0, reused 7, stale 0, failed 0"
    assert not list(pictures(config).glob("*.npz"))
    assert (config.parent / "train" / ".sdxl_cache" / "latents" / "index.sdxlidx").exists()
    write_picture(pictures(config) / "p0.png", 64, 64, seed=50)
    assert run("cache_latents", config, capsys, *flags) == "built 1, reused 6, stale 1, failed 0"
    (pictures(config) / "p1.txt").write_text("a dog", encoding="utf-8")
    assert run(TEXT, config, capsys, *flags) == "built 1, reused 6, stale 0, failed 0"
    monkeypatch.setattr(sdxl, "encode_text", lambda *_: pytest.fail("a complete cache needs no text encoder"))
    assert run(TEXT, config, capsys, *flags) == "built 0, reused 7, stale 0, failed 0"


def test_two_processes_fill_one_packed_cache(config, capsys):
    argv = ["--config_file", str(config), "--cache_store", "packed"]
    printed = two_ranks("tools.cache_latents", argv, config.parent)
    assert "".join(printed).strip().splitlines()[-1] == "built 7, reused 0, stale 0, failed 0"
    shards = list((config.parent / "train" / ".sdxl_cache" / "latents").glob("*.sdxlpack"))
    assert len(shards) == 2
    assert run("cache_latents", config, capsys, "--cache_store", "packed") == "built 0, reused 7, stale 0, failed 0"
