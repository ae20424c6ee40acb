"""New tokens through the real scripts: alone, beside a network, resumed, drawn, read by diffusers, on two processes."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdxl_gen_img
import sdxl_train_network
import sdxl_train_textual_inversion
from benchmarks.textual_inversion import colour
from library.inference.launch import generate
from library.inference.request import GenRequest
from library.inference.samplers import start_noise
from library.models.checkpoint import load_bundle, save_diffusers
from library.models.families import sdxl
from library.sizes import Size
from tests.e2e.conftest import arguments, copy_log, full_arguments, log_of
from tests.e2e.test_resume import state_tensors
from tests.ranks import two_ranks

TOKEN = ["--token_string=circle_q", "--num_vectors_per_token=2", "--token_norm_decay=0.1"]
RATE = "--learning_rate=1e-2"


@pytest.fixture
def named(pictures):
    """The pictures, with the token in all captions but the first."""
    for index, path in enumerate(sorted(pictures.rglob("*.txt"))):
        path.write_text(f"a red {'circle_q' if index else 'circle'}, number {index}, plain")
    return pictures


@pytest.fixture
def invert(tmp_path, named):
    """invert(output_name, *extra flags) runs sdxl_train_textual_inversion.main and returns the output folder."""

    def run(name, *flags):
        output = tmp_path / name
        argv = full_arguments(named, output, *TOKEN, RATE, *flags)
        assert sdxl_train_textual_inversion.main(argv) == 0
        return output

    return run


def drawn(folder, *flags):
    """The pictures that the generator draws, uint8 arrays in order."""
    prompt = ["--prompt=a CIRCLE_Q on white --n a circle_q", "--W=64", "--H=64", "--steps=2", "--seed=3"]
    assert sdxl_gen_img.main(["--ckpt=tiny", *prompt, f"--outdir={folder}", *flags]) == 0
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path))


@pytest.mark.e2e
def test_resumed_tokens_are_exact_and_all_other_weights_stay(invert, named, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a circle_q --n circle_q --w 64 --h 64 --s 1 --d 1\n")
    seen = []
    from library.models import checkpoint

    load = checkpoint.load_bundle
    monkeypatch.setattr(checkpoint, "load_bundle", lambda *a, **k: seen.append(load(*a, **k)) or seen[-1])
    flags = ["--max_train_steps=4", "--use_ema", "--ema_decay=0.5", "--shuffle_caption", "--gradient_checkpointing"]
    flags += ["--gradient_accumulation_steps=2", f"--sample_prompts={tmp_path / 'prompts.txt'}"]
    flags += ["--sample_every_n_steps=2", "--save_every_n_steps=2", "--save_state", "--init_word=blue"]
    flags += ["--max_data_loader_n_workers=1", "--metadata_author=me"]
    whole = invert("whole", *flags)
    copy_log(whole, whole.parent / "resumed")
    resumed = invert("resumed", *flags, f"--resume={whole / 'net-step00000002-state'}")

    expected, got = state_tensors(whole / "net-state"), state_tensors(resumed / "net-state")
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert log_of(whole) == log_of(resumed)
    optimizer = torch.load(whole / "net-state" / "optimizer.pt", weights_only=True)["state"]
    assert {tuple(state["exp_avg"].shape) for state in optimizer.values()} == {(2, 32), (2, 48)}
    first, last = load_file(whole / "net-step00000002.safetensors"), load_file(whole / "net.safetensors")
    assert list(last) == ["clip_g", "clip_l"] and not torch.equal(first["clip_l"], last["clip_l"])
    assert (whole / "net-ema.safetensors").is_file() and len(list((whole / "sample").glob("*.png"))) == 2
    with safe_open(whole / "net.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    assert (header["modelspec.author"], header["modelspec.trigger_phrase"]) == ("me", "circle_q")

    untouched = load("tiny")
    assert len(seen) == 2
    for trained in seen:
        for part in ("unet", "text_encoder_1", "text_encoder_2", "vae"):
            before, after = (getattr(each, part).state_dict() for each in (untouched, trained))
            assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.e2e
def test_diffusers_reads_the_file_and_sees_the_same(tmp_path):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    bundle = load_bundle("tiny")
    g = torch.Generator().manual_seed(1)
    rows = {"clip_l": torch.randn(2, 32, generator=g) * 0.3, "clip_g": torch.randn(2, 48, generator=g) * 0.3}
    save_file(rows, tmp_path / "circle_q.safetensors")
    save_diffusers(bundle, tmp_path / "folder")
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder", torch_dtype=torch.float32)
    pairs = ("clip_l", pipe.text_encoder, pipe.tokenizer), ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2)
    for name, encoder, tokenizer in pairs:
        pipe.load_textual_inversion(rows[name], token="circle_q", text_encoder=encoder, tokenizer=tokenizer)
    hidden, _, pooled, _ = pipe.encode_prompt("a circle_q, on white", do_classifier_free_guidance=False)

    from library.inference.embeddings import add_words, read_words

    plain = sdxl.encode_text_gen(bundle.text_encoder_1, bundle.text_encoder_2, bundle.tokenizer, ["a, on white"])
    words = read_words([str(tmp_path / "circle_q.safetensors")])
    assert list(words) == ["circle_q"]
    add_words(bundle, words)
    ours = sdxl.encode_text_gen(
        bundle.text_encoder_1, bundle.text_encoder_2, bundle.tokenizer, ["a circle_q, on white"]
    )
    assert torch.allclose(ours.hidden_BTD, hidden, atol=1e-5) and torch.allclose(ours.pooled_BP, pooled, atol=1e-5)
    assert (plain.hidden_BTD - ours.hidden_BTD).abs().max() > 0.1, "the token says something"
    settings = {"negative": "green", "steps": 4, "scale": 5.0, "seed": 1, "sampler": "euler"}
    request = GenRequest(prompt="a circle_q, on white", size=Size(64, 64), **settings)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = pipe(
        request.prompt, negative_prompt="green", width=64, height=64, num_inference_steps=4, guidance_scale=5.0,
        latents=start_noise([torch.Generator().manual_seed(1)], (4, 8, 8)), output_type="np",
    ).images[0]  # fmt: skip
    ((_, picture),) = generate(bundle, [request])
    assert np.abs(np.asarray(picture, dtype=np.float32) - (255 * theirs).round()).mean() < 0.02


@pytest.mark.e2e
def test_tokens_beside_a_network_resume_exactly_and_come_along_in_its_file(named, tmp_path):
    def run(name, *flags):
        output = tmp_path / name
        argv = arguments(named, output, *TOKEN, "--train_tokens", "--token_lr=2e-2", "--bundle_tokens", *flags)
        assert sdxl_train_network.main([*argv, "--network_train_unet_only", "--save_state"]) == 0
        return output

    whole = run("whole", "--max_train_steps=4", "--save_every_n_steps=2", "--save_last_n_steps=2")
    copy_log(whole, whole.parent / "resumed")
    resumed = run("resumed", "--max_train_steps=4", f"--resume={whole / 'net-step00000002-state'}")
    expected, got = state_tensors(whole / "net-state"), state_tensors(resumed / "net-state")
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert {key: value for key, value in log_of(whole)[-1].items() if key.startswith("lr/")} == {
        "lr/unet": 1e-2,
        "lr/tokens": 2e-2,
    }
    network = load_file(whole / "net.safetensors")
    tokens = load_file(whole / "net-tokens" / "circle_q.safetensors")
    inside = {key: value for key, value in network.items() if key.startswith("bundle_emb.")}
    assert inside.keys() == {"bundle_emb.circle_q.clip_l", "bundle_emb.circle_q.clip_g"}
    assert all(torch.equal(inside[f"bundle_emb.circle_q.{name}"], tokens[name]) for name in tokens)

    plain = tmp_path / "plain.safetensors"
    save_file({key: value for key, value in network.items() if key not in inside}, plain)
    lora = ["--network_module=networks.lora", f"--network_weights={whole / 'net.safetensors'}"]
    alone = [lora[0], f"--network_weights={plain}"]
    embedding = f"--textual_inversion_embeddings={whole / 'net-tokens' / 'circle_q.safetensors'}"
    bundled = drawn(tmp_path / "bundled", *lora)
    assert np.array_equal(bundled, drawn(tmp_path / "beside", *alone, embedding))
    assert not np.array_equal(bundled, drawn(tmp_path / "alone", *alone))
    assert sdxl_gen_img.main(["--ckpt=tiny", "--prompt=a", f"--outdir={tmp_path}", *lora, embedding]) == 2


@pytest.mark.e2e
def test_two_processes_learn_the_same_tokens_as_one(invert, named, tmp_path):
    flags = ["--max_train_steps=4", "--init_word=red", "--save_state"]
    one = invert("one", *flags, "--train_batch_size=4")
    two = tmp_path / "two"
    argv = full_arguments(named, two, *TOKEN, RATE, *flags, "--train_batch_size=2")
    two_ranks("sdxl_train_textual_inversion", argv, tmp_path)
    for first, second in zip(log_of(one), log_of(two), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=2e-3)
    expected, got = load_file(one / "net.safetensors"), load_file(two / "net.safetensors")
    assert all(torch.allclose(expected[name], got[name], atol=2e-3) for name in expected)


@pytest.mark.e2e
def test_a_token_learns_a_colour_and_lends_it_to_shapes_that_were_not_shown(tmp_path):
    ((before, after),) = colour(tmp_path, seed=1, steps=64, rate=0.03, times={"hidden": 1}).values()
    assert before > 70
    assert after < 0.8 * before


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--token_string=cat"], "the token cat is already in the vocabulary of the text encoders"),
        (["--token_string=qwy"], "none of the 7 captions holds the token qwy"),
    ],
)
def test_what_cannot_be_learnt_is_told_before_a_model_is_loaded(named, tmp_path, capsys, monkeypatch, flags, what):
    monkeypatch.setattr("library.models.checkpoint.load_bundle", None)
    argv = full_arguments(named, tmp_path / "out", RATE, *flags)
    assert sdxl_train_textual_inversion.main(argv) == 2
    assert what in capsys.readouterr().err


def test_an_embedding_for_another_model_is_refused_before_a_model_is_loaded(named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("library.models.checkpoint.filled", None)
    path = tmp_path / "other.safetensors"
    save_file({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, path)
    argv = ["--ckpt=tiny", "--prompt=a", f"--outdir={tmp_path}", f"--textual_inversion_embeddings={path}"]
    assert sdxl_gen_img.main(argv) == 2
    for main, make in (
        (sdxl_train_textual_inversion.main, full_arguments),
        (sdxl_train_network.main, lambda *some: arguments(*some, "--train_tokens")),
    ):
        assert main(make(named, tmp_path / "out", *TOKEN, f"--weights={path}")) == 2
    sentences = capsys.readouterr().err
    assert sentences.count("vectors of 768 and 1280 numbers, this model's have 32 and 48: it was made for") == 3
    assert sentences.count(str(path)) == 3 and sentences.count("choose an embedding made for this model") == 3
