"""Pictures as prompts: CLIP's preprocessing, its encoder from folders, and what reaches the U-Net."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

import sdxl_gen_img
from library.errors import UserError
from library.inference.image_prompts import ImagePrompts, image_pixels
from library.inference.launch import encode_requests, generate
from library.inference.request import GenRequest
from library.models.clip_vision import embed, load_image_encoder
from library.sizes import Size

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def picture(seed: int, size=(90, 60)) -> Image.Image:
    """Blocks of colours, in which resizing shows."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory):
    """A random image encoder whose vectors are as wide as the model's pooled ones."""
    path = tmp_path_factory.mktemp("clip")
    width = bundle.text_encoder_2.config.projection_dim
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SIZES, projection_dim=width, image_size=32, patch_size=8)
    CLIPVisionModelWithProjection(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("size", [(90, 60), (33, 71), (32, 32), (500, 333), (20, 21)])
def test_pixels_are_those_of_clips_own_processor(size):
    image = picture(1, size)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)(image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(image_pixels(image, 32), theirs[0], atol=1e-5)


def test_an_encoder_comes_from_its_own_folder_and_from_that_of_a_whole_clip(bundle, folder, tmp_path):
    width = bundle.text_encoder_2.config.projection_dim
    pixels = image_pixels(picture(1), 32)[None]
    ours = embed(load_image_encoder(str(folder), width=width, dtype=torch.float32), pixels)
    reference = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = reference(pixel_values=pixels).image_embeds
    assert ours.shape == (1, width) and torch.equal(ours, theirs)

    words = {**SIZES, "vocab_size": 99, "max_position_embeddings": 8}
    whole = CLIPModel(CLIPConfig(text_config=words, vision_config={**SIZES, "image_size": 32, "patch_size": 8},
                                 projection_dim=width))  # fmt: skip
    whole.vision_model.load_state_dict(reference.vision_model.state_dict())
    whole.visual_projection.load_state_dict(reference.visual_projection.state_dict())
    whole.save_pretrained(tmp_path)
    assert torch.equal(embed(load_image_encoder(str(tmp_path), width=width, dtype=torch.float32), pixels), ours)

    with pytest.raises(UserError, match=f"have {width} numbers, and the model's pooled vectors 7"):
        load_image_encoder(str(folder), width=7, dtype=torch.float32)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="of which 40 are missing"):
        load_image_encoder(str(tmp_path), width=width, dtype=torch.float32)


def test_every_picture_speaks_for_the_prompt_that_is_drawn_over_it(bundle, folder):
    images = [picture(1), picture(2), picture(1)]
    requests = [GenRequest(prompt="a red circle", negative="bad", size=Size(64, 64), steps=2, strength=0.5, scale=3.0,
                           seed=1, sampler="euler", image=image) for image in images]  # fmt: skip
    prompts, seen = ImagePrompts(str(folder), 20.0), []

    class Spy:
        @contextmanager
        def on(self, batch, *, calls, device):
            yield lambda call: seen.append(call.text.pooled_BP)

    conditioning = encode_requests(bundle, requests)
    plain = [conditioning.text(request) for request in requests]
    conditioning.pictures = prompts.vectors(bundle, requests)
    encoder = load_image_encoder(str(folder), width=plain[0].pooled_BP.shape[1], dtype=torch.float32)
    for request, before in zip(requests, plain, strict=True):
        told = conditioning.text(request)
        assert torch.equal(told.pooled_BP, 20 * embed(encoder, image_pixels(request.image, 32)[None]))
        assert torch.equal(told.hidden_BTD, before.hidden_BTD) and not torch.equal(told.pooled_BP, before.pooled_BP)
        negative = conditioning.text(request, negative=True).pooled_BP
        assert torch.equal(negative, encode_requests(bundle, [request]).text(request, negative=True).pooled_BP)
    other = replace(requests[0], image=None)
    assert torch.equal(conditioning.text(other).pooled_BP, plain[0].pooled_BP)

    def drawn(some):
        found = generate(bundle, some, batch_size=3, conditioning=conditioning, followers=[Spy()])
        return [np.asarray(image).astype(int) for _, image in found]

    one, two, three = drawn(requests)
    negative = conditioning.text(requests[0], negative=True).pooled_BP
    expected = torch.cat([negative] * 3 + [conditioning.pictures[id(image)] for image in images])
    assert torch.equal(seen[0], expected) and not torch.equal(expected[3], expected[4])
    assert all(map(np.array_equal, drawn(requests[::-1]), (three, two, one))) and np.array_equal(one, three)
    conditioning.pictures = {}
    assert np.abs(drawn(requests)[0] - one).mean() > 0.5


def test_the_script_embeds_what_it_draws_over(folder, bundle, tmp_path, capsys, monkeypatch):
    picture(3, (64, 64)).save(tmp_path / "a.png")
    base = ["--ckpt", "tiny", "--prompt", "red", "--steps", "2", "--seed", "1", "--image_path", str(tmp_path / "a.png"),
            "--sequential_file_name"]  # fmt: skip
    pictures = []
    for name, options in (("plain", []), ("told", ["--clip_vision_strength", "2"])):
        more = [*options, "--clip_vision_model", str(folder)] if options else []
        assert sdxl_gen_img.main([*base, *more, "--outdir", str(tmp_path / name)]) == 0
        pictures.append(np.asarray(Image.open(tmp_path / name / "im_000001.png")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.5

    narrow, out = tmp_path / "narrow", tmp_path / "none"
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(**SIZES, projection_dim=24, image_size=32, patch_size=8)
    ).save_pretrained(narrow)
    told = ["--clip_vision_strength", "1", "--clip_vision_model", str(narrow), "--outdir", str(out)]
    monkeypatch.setattr("library.inference.run.load_for_drawing", None)
    assert sdxl_gen_img.main([*base, *told]) == 2
    assert "vectors have 24 numbers" in capsys.readouterr().err and not out.exists()
