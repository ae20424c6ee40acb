"""Pictures of the tiny model: the same as diffusers', independent of batching, changed by networks."""

from dataclasses import replace

import diffusers
import numpy as np
import peft
import pytest
import torch

from library.inference import launch
from library.inference.adapters import adapter_roots, load_networks
from library.inference.launch import encode_requests, generate
from library.inference.request import GenRequest
from library.inference.samplers import start_noise
from library.inference.texts import TextForm
from library.sizes import Size
from networks import lora

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and NumPy 2

RED = GenRequest(
    prompt="a red circle on a blue background", size=Size(128, 128), steps=5, scale=5.0, seed=1, sampler="euler"
)
SAME = 0.02  # of 255, on average: measured 0.0000 to 0.0003
SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SETTINGS),
    "ddim": lambda: diffusers.DDIMScheduler(**SETTINGS, clip_sample=False),
}


def pictures(bundle, requests, **how) -> list[np.ndarray]:
    """uint8 (H, W, 3) of each request, in order."""
    return [np.asarray(picture) for _, picture in generate(bundle, requests, **how)]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference, in steps of 1/255."""
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_same_picture_as_diffusers_pipeline(bundle, pipeline, sampler):
    request = replace(
        RED, sampler=sampler, negative="green", original_width=200, original_height_negative=16, crop_top=8
    )
    pipeline.scheduler = SCHEDULERS[sampler]()
    theirs = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative,
        width=128,
        height=128,
        num_inference_steps=request.steps,
        guidance_scale=request.scale,
        latents=start_noise([torch.Generator().manual_seed(request.seed)], (4, 16, 16)),
        original_size=(128, 200),
        crops_coords_top_left=(8, 0),
        negative_original_size=(16, 200),
        negative_crops_coords_top_left=(8, 0),
        negative_target_size=(128, 128),
        output_type="np",
    ).images[0]
    (ours,) = pictures(bundle, [request])
    assert difference(ours, (theirs * 255).round()) < SAME
    assert ours.std() > 20  # and it is a picture


def test_an_empty_negative_is_the_encoded_empty_text(bundle, pipeline):
    pipeline.scheduler = SCHEDULERS["euler"]()
    noise = start_noise([torch.Generator().manual_seed(1)], (4, 16, 16))
    settings = {"width": 128, "height": 128, "num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "np"}
    theirs = pipeline(prompt=RED.prompt, negative_prompt="", latents=noise, **settings).images[0]
    assert difference(pictures(bundle, [RED])[0], (theirs * 255).round()) < SAME


@pytest.mark.parametrize("with_network", [False, True], ids=["plain", "lora"])
def test_what_a_picture_is_drawn_with_changes_no_bit(bundle, lora_file, with_network):
    shapes = ("circle", "star", "cross", "square", "ring")
    small = replace(RED, size=Size(64, 64), sampler="euler_a", steps=2, negative_scale=2.0)
    requests = [replace(small, seed=seed, prompt=f"a red {shape}")
                for seed, shape in enumerate(shapes)]  # fmt: skip
    files = [str(lora_file)] if with_network else []
    networks = load_networks(bundle, modules=["networks.lora"] * len(files), weights=files)
    try:
        alone = pictures(bundle, requests)
        for size in (2, 3, 5):
            drawn = pictures(bundle, requests[::-1], batch_size=size)
            assert [one.tobytes() for one in alone] == [one.tobytes() for one in drawn[::-1]]
    finally:
        for network in networks:
            network.detach()
    assert difference(alone[0], alone[1]) > 5


def test_pictures_come_in_order_and_only_equal_settings_share_a_batch(bundle, monkeypatch):
    sizes = []
    original = launch._drawn
    monkeypatch.setattr(
        launch, "_drawn", lambda stage, batch, at_once: sizes.append(len(batch)) or original(stage, batch, at_once)
    )
    small = replace(RED, steps=1, size=Size(64, 64))
    requests = [small, replace(small, seed=2), replace(small, seed=3, prompt="x"), replace(small, size=Size(64, 96)),
                replace(small, scale=2.0), replace(small, steps=2), small]  # fmt: skip
    got = list(generate(bundle, requests, batch_size=2))
    assert [request for request, _ in got] == requests
    assert [picture.size for _, picture in got] == [(64, 64)] * 3 + [(64, 96)] + [(64, 64)] * 3
    assert sizes == [2, 1, 1, 1, 1, 1]


def test_decoding_in_smaller_batches_changes_nothing_visible(bundle):
    batch = [replace(RED, seed=seed, steps=1) for seed in (1, 2, 3)]
    whole, apart = (pictures(bundle, batch, batch_size=3, vae_batch_size=n) for n in (3, 1))
    assert all(difference(a, b) < 0.05 for a, b in zip(whole, apart, strict=True))


def test_without_guidance_the_negative_prompt_is_not_read(bundle):
    plain = replace(RED, scale=1.0)
    assert np.array_equal(*(pictures(bundle, [replace(plain, negative=text)])[0] for text in ("", "green star")))
    guided = replace(RED, scale=2.0)
    assert difference(*(pictures(bundle, [replace(guided, negative=text)])[0] for text in ("", "green star"))) > 1


def test_prompts_encoded_before_give_the_same_pictures_without_text_encoders(bundle):
    requests = [RED, replace(RED, seed=2)]
    conditioning = encode_requests(bundle, requests, text_form="train")
    assert len(conditioning.rows) == 2  # one prompt and one empty negative
    without = replace(bundle, text_encoder_1=None, text_encoder_2=None)
    ready = pictures(without, requests, conditioning=conditioning)
    assert all(map(np.array_equal, ready, pictures(bundle, requests, conditioning=TextForm("train"))))


def test_short_prompts_mean_the_same_in_both_text_forms(bundle):
    assert np.array_equal(*(pictures(bundle, [RED], conditioning=TextForm(form))[0] for form in ("train", "generate")))


def test_a_prompt_that_is_cut_is_named(bundle, caplog):
    long = replace(RED, prompt="a red circle, " * 30)
    encode_requests(bundle, [long], text_form=TextForm("generate", 2))
    assert not caplog.records
    encode_requests(bundle, [long])
    assert "120 tokens, of which 75 are read (max_embeddings_multiples)" in caplog.text


def test_long_prompts_use_the_chunks_that_they_are_allowed(bundle):
    long = replace(RED, prompt="a red circle, " * 30 + "on a blue background", steps=1)
    form = TextForm("generate", 3)
    conditioning = encode_requests(bundle, [long, RED], text_form=form)
    assert conditioning.num_positions(long) == 2 * 77 and conditioning.num_positions(RED) == 77
    assert conditioning.text(long, negative=True).hidden_BTD.shape[1] == 2 * 77
    assert encode_requests(bundle, [RED], text_form=TextForm("train", 2)).num_positions(RED) == 152
    assert len(pictures(bundle, [long, RED], conditioning=form, batch_size=2)) == 2


def test_prompt_weights_act(bundle):
    request = replace(RED, scale=1.0)
    plain, heavy = (pictures(bundle, [replace(request, prompt=p)])[0] for p in ("a red circle", "a (red:1.6) circle"))
    assert difference(plain, heavy) > 0.1


def test_a_missing_seed_is_random_and_leaves_the_global_generator_alone(bundle):
    state = torch.get_rng_state()
    request = replace(RED, seed=None, steps=1, scale=1.0, sampler="euler_a")
    first, second = pictures(bundle, [request, request])
    assert difference(first, second) > 1
    assert torch.equal(torch.get_rng_state(), state)


# --- networks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def networks(bundle, lora_file):
    loaded = load_networks(bundle, modules=["networks.lora"] * 2, weights=[str(lora_file)] * 2, muls=[0.75])
    yield loaded
    for network in loaded:
        network.detach()


def test_roots_name_the_modules_of_sdxl(bundle):
    names = lora.create(adapter_roots(bundle), dim=1, alpha=1).adapters.keys()
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1" in names
    assert "lora_te2_text_model_encoder_layers_2_self_attn_out_proj" in names
    assert "lora_unet_output_blocks_0_1_transformer_blocks_1_ff_net_0_proj" in names
    assert {name.split("_")[1] for name in names} == {"te1", "te2", "unet"}


def test_networks_change_the_picture_and_strength_zero_does_not(bundle, lora_file):
    (base,) = pictures(bundle, [RED])
    (network,) = load_networks(bundle, modules=["networks.lora"], weights=[str(lora_file)])
    try:
        assert difference(pictures(bundle, [RED])[0], base) > 1
        network.set_multiplier(0.0)
        assert np.array_equal(pictures(bundle, [RED])[0], base)
    finally:
        network.detach()


def test_strengths_in_a_prompt_act_on_its_picture_only(bundle, networks):
    assert [network.multiplier for network in networks] == [0.75, 1.0]
    off, some = replace(RED, network_muls=(0.0,)), replace(RED, network_muls=(0.5, 0.25))
    first, second, third = pictures(bundle, [off, some, RED], batch_size=3, networks=networks)
    assert [network.multiplier for network in networks] == [0.75, 1.0]
    for network in networks:
        network.detach()
    assert np.array_equal(pictures(bundle, [RED])[0], first)  # 0.0 for the first holds for the second too
    for network in networks:
        network.attach()
    assert np.array_equal(pictures(bundle, [RED], networks=networks)[0], third)
    assert np.array_equal(pictures(bundle, [some], networks=networks)[0], second)
    assert difference(second, third) > 0.5 and difference(first, second) > 0.5


def test_merged_networks_give_the_picture_that_applied_ones_give(bundle, lora_file):
    weights = {name: w.clone() for part in (bundle.unet, bundle.text_encoder_1, bundle.text_encoder_2)
               for name, w in part.state_dict(prefix=f"{id(part)}.").items()}  # fmt: skip
    files = {"modules": ["networks.lora"], "weights": [str(lora_file)], "muls": [0.8]}
    (network,) = load_networks(bundle, **files)
    (applied,) = pictures(bundle, [RED])
    network.detach()
    try:
        assert load_networks(bundle, **files, merge=True) == []
        assert difference(pictures(bundle, [RED])[0], applied) < 0.5
    finally:
        for part in (bundle.unet, bundle.text_encoder_1, bundle.text_encoder_2):
            part.load_state_dict({name: weights[f"{id(part)}.{name}"] for name in part.state_dict()})


def test_diffusers_makes_the_same_picture_of_our_network_live_and_fused(bundle, pipeline, lora_file):
    pipeline.scheduler = SCHEDULERS["euler"]()
    noise = start_noise([torch.Generator().manual_seed(1)], (4, 16, 16))
    settings = {"width": 128, "height": 128, "num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "np"}

    def theirs():
        return (pipeline(prompt=RED.prompt, negative_prompt="", latents=noise, **settings).images[0] * 255).round()

    pipeline.load_lora_weights(lora_file.parent, weight_name=lora_file.name)
    (network,) = load_networks(bundle, modules=["networks.lora"], weights=[str(lora_file)])
    try:
        (ours,) = pictures(bundle, [RED])
        assert difference(ours, theirs()) < SAME
        pipeline.fuse_lora()
        assert not any(isinstance(layer, peft.tuners.lora.LoraLayer) and not layer.merged
                       for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
                       for layer in part.modules())  # fmt: skip
        assert difference(ours, theirs()) < SAME
        pipeline.unfuse_lora()
    finally:
        network.detach()
        pipeline.unload_lora_weights()
    assert difference(ours, pictures(bundle, [RED])[0]) > 1
