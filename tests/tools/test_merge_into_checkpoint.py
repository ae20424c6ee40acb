"""A merged checkpoint is base + ratio * block weight * delta by tensor, and draws what the live network draws."""

import json
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

import sdxl_gen_img
from library.inference.adapters import adapter_roots
from library.inference.lora_tools import merge_model
from library.io.safetensors_file import TensorReader
from library.models.checkpoint import load_bundle, save_diffusers
from tests.networks.test_contract import create, trained
from tests.tools.reference import merged, modules_of
from tools import merge_lora

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and NumPy 2


def run(base, models, ratios, out, *more):
    argv = ["--sd_model", str(base), "--models", *map(str, models), "--ratios", *map(str, ratios)]
    return merge_lora.main([*argv, "--save_to", str(out), *more])


def assert_same(found, wanted, tolerance=2e-6):
    assert found.keys() == wanted.keys()
    wrong = [key for key in wanted if np.abs(found[key] - wanted[key]).max(initial=0) > tolerance]
    assert wrong == []


def test_the_result_is_the_base_plus_the_weighted_changes(base, few, second, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert run(base, [few, second], [0.8, -0.5], out) == 0
    wanted = merged(base, [(few, 0.8, {}), (second, -0.5, {})])
    assert_same(load_file(out), wanted)
    untouched = load_file(base)
    changed = [key for key in untouched if not np.array_equal(untouched[key], wanted[key])]
    assert len(changed) == 192 + 6 + 18 + 3 * 4  # bigG's q, k and v are one tensor
    assert "U-Net" in capsys.readouterr().out


def test_block_weights_multiply_the_blocks_that_the_list_names(base, second, few, tmp_path):
    out = tmp_path / "out.safetensors"
    weights = [0.5, 0, 0.25, 2, 1, 3, 1, 1, 0, 0.5, 1, 1]  # BASE, IN04, IN05, IN07, IN08, MID, OUT00-05
    ones = json.dumps([1] * 12)
    assert run(base, [second, few], [1, 1], out, "--lbws", json.dumps(weights), ones) == 0
    starts = ("input_blocks_4_", "input_blocks_5_", "input_blocks_7_", "input_blocks_8_", "middle_block_")
    starts += tuple(f"output_blocks_{n}_" for n in range(6))
    table = {}
    for name in modules_of(second):
        if "text_model" in name:
            table[name] = 0.5
        for start, weight in zip(starts, weights[1:], strict=True):
            if name.startswith("lora_unet_" + start):
                table[name] = weight
    assert_same(load_file(out), merged(base, [(second, 1.0, table), (few, 1.0, {})]))


def test_a_diffusers_folder_gives_the_same_tensors(tiny, base, few, tmp_path):
    save_diffusers(tiny, tmp_path / "folder")
    run(base, [few], [0.7], tmp_path / "a.safetensors")
    run(tmp_path / "folder", [few], [0.7], tmp_path / "b.safetensors")
    ours, theirs = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_diffusers_names_are_understood(tiny, base, few, tmp_path, changed):
    from library.models.keymaps.unet import diffusers_to_sai

    modules = {n for n, m in tiny.unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    names = {"lora_unet_" + diffusers_to_sai(n).replace(".", "_"): "lora_unet_" + n.replace(".", "_") for n in modules}
    tensors = load_torch(few)
    renamed = {key: None for key in tensors if key.startswith("lora_unet")}
    for key in list(renamed):
        name, _, tail = key.partition(".")
        renamed[f"{names[name]}.{tail}"] = tensors[key]
    other = changed(few, renamed)
    assert any("up_blocks" in key for key in load_file(other))
    run(base, [few], [1], tmp_path / "a.safetensors")
    run(base, [other], [1], tmp_path / "b.safetensors")
    ours, theirs = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_precision_and_metadata(base, few, tmp_path, capsys):
    out = tmp_path / "title.safetensors"
    run(base, [few], [1], out, "--save_precision", "bf16")
    found = load_torch(out)
    exact = merged(base, [(few, 1.0, {})])
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    assert torch.equal(found[key], torch.from_numpy(exact[key]).float().bfloat16())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("U-Net"))
    assert 1e-3 < float(line.split()[3]) < 0.2  # bfloat16 has 8 bits: part of the change is lost, and that is said
    with safe_open(out, "pt") as file:
        header = file.metadata()
    assert header["modelspec.title"] == "title" and header["modelspec.merged_from"] == "base, few"
    assert header["arch.head_dim"] == "16" and header["modelspec.prediction_type"] == "epsilon"
    run(base, [few], [1], out, "--precision", "bf16", "--no_metadata")
    assert "modelspec.merged_from" not in TensorReader(out).metadata
    found = load_torch(out)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    plain, delta = load_torch(base)[key], torch.from_numpy(exact[key]).float() - load_torch(base)[key].float()
    rounded_first = (plain.bfloat16().float() + delta).bfloat16()
    assert torch.equal(found[key], rounded_first) and not torch.equal(rounded_first, (plain.float() + delta).bfloat16())


def test_tensors_are_read_one_at_a_time(base, few, tmp_path, monkeypatch):
    """Of the checkpoint's tensors only a few are alive at any moment while the result is written."""
    alive, peak = set(), [0, 0]
    read = TensorReader.__getitem__

    def counted(self, name):
        tensor = read(self, name)
        if self.path == base:
            peak[1] += 1
            alive.add(peak[1])
            weakref.finalize(tensor, alive.discard, peak[1])
            peak[0] = max(peak[0], len(alive))
        return tensor

    monkeypatch.setattr(TensorReader, "__getitem__", counted)
    run(base, [few], [1], tmp_path / "out.safetensors")
    assert peak[1] >= len(load_file(base))
    assert 1 <= peak[0] <= 5


STRENGTHS = {"dora": 0.7, "dora on inputs": 0.4, "oft": 0.8, "dylora": -0.5, "lora_fa": 0.6}


def test_every_kind_merged_predicts_what_all_of_them_predict_live(tiny, base, tmp_path):
    networks, paths = [], []
    for kind, strength in STRENGTHS.items():
        network = trained(create(kind, adapter_roots(tiny))[1], size=0.02).eval()
        network.set_multiplier(strength)
        paths.append(tmp_path / f"{kind}.safetensors")
        save_file(network.export()[0], paths[-1])
        networks.append(network)
    out = tmp_path / "out.safetensors"
    assert run(base, paths, STRENGTHS.values(), out) == 0
    merged_bundle = load_bundle(str(out))
    plain = whole_outputs(tiny)
    for network in networks:
        with torch.no_grad():
            assert max(float(adapter.delta_weight().norm()) for adapter in network.adapters.values()) > 0.1
        network.attach()
    try:
        live = whole_outputs(tiny)
    finally:
        for network in networks:
            network.detach()
    for one, other, before in zip(whole_outputs(merged_bundle), live, plain, strict=True):
        assert (other - before).abs().max() > 0.01
        assert (one - other).abs().max() < 1e-4


@torch.no_grad()
def whole_outputs(bundle):
    """The prediction for one input, and the hidden states of both text encoders."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 900, (1, 77), generator=g)
    hidden = [te(ids, output_hidden_states=True).hidden_states[-2]
              for te in (bundle.text_encoder_1, bundle.text_encoder_2)]  # fmt: skip
    config = bundle.unet.config
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    told = {"text_embeds": torch.randn(1, width, generator=g), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    noise, context = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 7, config.cross_attention_dim, generator=g)
    return [bundle.unet(noise, 500, context, added_cond_kwargs=told).sample, *hidden]


@pytest.mark.parametrize("kind", ["dora", "oft"])
def test_other_kinds_are_checked_before_anything_is_computed(kind, tiny, base, tmp_path, capsys, monkeypatch):
    tensors = create(kind, adapter_roots(tiny))[1].export()[0]
    name, (own, wider) = "unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", {
        "dora": ("lora_down.weight", torch.zeros(4, 768)),
        "oft": ("oft_blocks", torch.zeros(4, 80, 80)),
    }[kind]  # fmt: skip
    (key,) = (key for key in tensors if key.endswith(f"{name}.{own}"))
    monkeypatch.setattr(merge_model, "save", lambda *_, **__: pytest.fail("it was computed"))
    path = tmp_path / "other.safetensors"
    other = name.replace("input_blocks_4_1", "down_blocks_1_attentions_0")
    twice = {k.replace(name, other): v.clone() for k, v in tensors.items() if name in k}
    for changed, says in ((tensors | {key: wider}, f"{key} has shape"),
                          ({k: v for k, v in tensors.items() if k != key}, f'"{key}" is missing'),
                          (tensors | twice, "is in the file twice")):  # fmt: skip
        save_file(changed, path)
        assert run(base, [path], [1], tmp_path / "out.safetensors") == 2
        assert says in capsys.readouterr().err


@pytest.mark.e2e
def test_the_merged_checkpoint_draws_what_the_live_network_draws(base, second, tmp_path):
    run(base, [second], [0.9], tmp_path / "merged.safetensors")
    shared = "--prompt a_red_circle --steps 3 --seed 3 --W 64 --H 64 --sequential_file_name".split()  # noqa: SIM905
    live = ["--network_module", "networks.lora", "--network_weights", str(second), "--network_mul", "0.9"]
    for name, more in (("live", live), ("merged", []), ("plain", [])):
        ckpt = tmp_path / "merged.safetensors" if name == "merged" else base
        sdxl_gen_img.main(["--ckpt", str(ckpt), "--outdir", str(tmp_path / name), *shared, *more])
    live, merged_picture, plain = (
        np.asarray(Image.open(next((tmp_path / name).glob("*.png"))), np.int16) for name in ("live", "merged", "plain")
    )
    assert np.abs(live - merged_picture).max() <= 1  # sums in another order round differently
    assert np.abs(live - plain).max() > 10
