"""Networks that act in parts of a picture, each with its own sub-prompt: masks, layers, texts, pictures."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sdxl_gen_img
from library.config.cli import make_config
from library.inference.adapters import adapter_roots
from library.inference.launch import encode_requests, generate
from library.inference.region_masks import EPSILON, in_cells, region_masks, shares
from library.inference.regional import Regional, read_regions
from library.inference.request import GenRequest
from library.inference.settings import sources_of
from library.inference.texts import TextForm
from library.io.safetensors_file import save
from library.sizes import Size
from networks import dora, lora, oft

REQUEST = GenRequest(
    prompt="a red circle AND a blue star", negative="blurry", size=Size(64, 96), steps=2, scale=3.0, seed=3
)
LEFT_RIGHT = torch.zeros(96, 64, 3, dtype=torch.uint8)
LEFT_RIGHT[:, :32, 0] = LEFT_RIGHT[:, 32:, 1] = 255
STEP = 1  # of 255


# --- masks -------------------------------------------------------------------------------------------------------


def test_channels_are_the_masks_of_the_first_three():
    pixels = torch.tensor([[[255, 0, 0], [51, 204, 0]]], dtype=torch.uint8)
    masks = region_masks(pixels, count=4)
    expected = [[1.0, 0.2], [0.0, 0.8], [1.0, 1.0], [1.0, 1.0]]  # no blue: everywhere, like a fourth
    assert torch.allclose(masks, torch.tensor(expected)[:, None])


def test_colours_are_numbers_in_bits():
    colours = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 255, 0], [0, 0, 255], [255, 0, 255], [0, 255, 255]]
    pixels = torch.tensor([[*colours, [255, 255, 255], [254, 0, 0]]], dtype=torch.uint8)
    masks = region_masks(pixels, count=7, color_codes=7)
    assert torch.equal(masks[:, 0], torch.eye(9)[1:8])
    few = region_masks(pixels, count=4, color_codes=3)
    assert torch.equal(few[:3, 0], torch.eye(9)[1:4]) and few[3].min() == 1
    assert region_masks(pixels[:, :2], count=2, color_codes=2)[1].min() == 1, "a colour that is not there is everywhere"


def test_cells_take_the_mean_of_their_pixels_and_shares_add_up():
    masks = torch.zeros(2, 4, 8)
    masks[0, :, :3], masks[1, 1:] = 1.0, 0.5
    cells = in_cells(masks, (2, 2))
    assert torch.equal(cells[0], torch.tensor([[0.75, 0.0], [0.75, 0.0]]))
    assert torch.equal(cells[1], torch.tensor([[0.25, 0.25], [0.5, 0.5]]))
    assert torch.allclose(shares(cells)[0, 0, 0], torch.tensor(0.75 / (1.0 + EPSILON)))
    assert in_cells(masks, (8, 16))[0, 0, 0] == 1.0 and in_cells(masks, (8, 16)).shape == (2, 8, 16)
    assert shares(torch.zeros(2, 1, 1)).max() == 0


# --- a model with networks ---------------------------------------------------------------------------------------


def noisy(bundle, seed: int, kind=lora):
    """A network on all parts, convolutions too, that changes a picture visibly."""
    g = torch.Generator().manual_seed(seed)
    alpha, args = (0.3, {"enable_conv": "true"}) if kind is oft else (4, {"conv_dim": "2"})
    network = kind.create(adapter_roots(bundle), dim=4, alpha=alpha, generator=g, args=args)
    for adapter in network.adapters.values():
        moved = adapter.oft_blocks if kind is oft else adapter.lora_up.weight
        torch.nn.init.normal_(moved, std=0.1, generator=g)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def own(bundle):
    """A copy of the model with two LoRAs at work: (bundle, networks)."""
    model = copy.copy(bundle)
    model.unet, model.text_encoder_1, model.text_encoder_2 = map(
        copy.deepcopy, (bundle.unet, bundle.text_encoder_1, bundle.text_encoder_2)
    )
    return model, [noisy(model, 1).attach(), noisy(model, 2).attach()]


def drawn(model, requests, networks, mask=LEFT_RIGHT, *, batch_size=1, codes=None) -> list[np.ndarray]:
    """Pictures as int16 arrays; mask None: without regions."""
    followers = [] if mask is None else [Regional(model.unet, networks, mask, color_codes=codes)]
    pictures = generate(model, requests, batch_size=batch_size, networks=networks, followers=followers)
    return [np.asarray(picture).astype(np.int16) for _, picture in pictures]


class Seen:
    """What modules of the U-Net were given and gave in the last call: name -> (inputs, output)."""

    def __init__(self, unet, names: list[str]) -> None:
        self.calls = {}
        self.hooks = [unet.get_submodule(name).register_forward_hook(self._keep(name), with_kwargs=True)
                      for name in names]  # fmt: skip

    def _keep(self, name):
        return lambda module, args, kwargs, out: self.calls.update({name: ([*args, *kwargs.values()], out)})


def change(network, layer) -> Tensor:
    """What a network adds to a layer's weight, in float64, at its strength."""
    (adapter,) = (adapter for adapter in network.adapters.values() if adapter.base is layer)
    return adapter.multiplier * adapter.delta_weight().double()


def attended(attn, x: Tensor, text: Tensor, networks) -> tuple[Tensor, Tensor]:
    """(W o, sum of D o) of softmax attention in float64: keys and values with all of `networks`, queries given."""
    keys, values = (text @ (layer.weight.double() + sum(change(n, layer) for n in networks)).T
                    for layer in (attn.to_k, attn.to_v))  # fmt: skip
    heads = [t.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for t in (x, keys, values)]
    weights = (heads[0] @ heads[1].transpose(1, 2) / heads[0].shape[-1] ** 0.5).softmax(dim=-1)
    o = (weights @ heads[2]).transpose(0, 1).flatten(1)
    layer = attn.to_out[0]
    own = o @ layer.weight.double().T + layer.bias.double()
    return own, sum((o @ change(n, layer).T for n in networks), torch.zeros_like(own))


PLACE = "down_blocks.1.attentions.0"
TOKENS = f"{PLACE}.transformer_blocks.0"


def test_every_kind_of_layer_computes_what_the_page_says(own):
    model, networks = own
    names = [f"{TOKENS}.attn2", f"{TOKENS}.attn1.to_v", "down_blocks.0.resnets.0.conv1",
             "down_blocks.0.resnets.0.time_emb_proj"]  # fmt: skip
    mask = LEFT_RIGHT.clone()
    mask[:48, :, 2] = 200  # a third sub-prompt, without a network, that overlaps the others
    request = replace(
        REQUEST, prompt=f"{REQUEST.prompt} AND a circle", steps=1, network_muls=(1.0, 0.6), negative_scale=1.0
    )
    batch = [request, replace(request, prompt="one AND two AND three", seed=4, negative="green")]
    seen = Seen(model.unet, names)
    strong = [(network, strength) for network, strength in zip(networks, request.network_muls, strict=True)]
    try:
        drawn(model, batch, networks, mask, batch_size=2)
        for network, strength in strong:
            network.set_multiplier(strength)
        pixels = mask.permute(2, 0, 1).double() / 255
        _check_attention(model.unet, seen.calls[names[0]], networks, pixels)
        _check_places(model.unet, seen.calls, names[1:], networks, pixels)
    finally:
        for hook in seen.hooks:
            hook.remove()
        for network in networks:
            network.set_multiplier(1.0)


def _check_attention(unet, call, networks, pixels) -> None:
    (x, text, *_), out = call
    attn, parts, positions = unet.get_submodule(f"{TOKENS}.attn2"), 3, text.shape[1] // 3
    cells = _means(pixels, x.shape[1])
    query = x.double() @ attn.to_q.weight.double().T
    for part, network in enumerate(networks):
        query = query + cells[part][:, None] * (x.double() @ change(network, attn.to_q).T)
    assert len(x) == 6, "negative, prompt and no prompt, two pictures each"
    for row in range(6):
        said = text[row].double().split(positions)
        if row in (2, 3):  # the prompts
            found = [attended(attn, query[row], said[i], networks[i : i + 1]) for i in range(parts)]
            total = sum(cells[i] for i in range(parts))[:, None]
            expected = sum(cells[i][:, None] * (found[i][0] / (total + 1e-4) + found[i][1]) for i in range(parts))
        else:
            assert torch.equal(said[0], said[2])
            expected, _ = attended(attn, query[row], said[0], [])
        assert torch.allclose(out[row].double(), expected, atol=2e-5), row


def _check_places(unet, calls, names, networks, pixels) -> None:
    linear, conv, embedding = names
    (x, *_), out = calls[linear]
    layer, cells = unet.get_submodule(linear), _means(pixels, x.shape[1])
    added = sum(cells[i][:, None] * (x.double() @ change(networks[i], layer).T) for i in range(2))
    assert torch.allclose(out.double(), x.double() @ layer.weight.double().T + added, atol=2e-5)

    (x, *_), out = calls[conv]
    layer, grid = unet.get_submodule(conv), _means(pixels, x.shape[2] * x.shape[3]).reshape(3, *x.shape[2:])
    added = sum(grid[i] * torch.conv2d(x.double(), change(networks[i], layer), padding=1) for i in range(2))
    plain = torch.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    assert torch.allclose(out.double(), plain + added, atol=2e-5)

    (x, *_), out = calls[embedding]
    layer = unet.get_submodule(embedding)
    weight = layer.weight.double() + sum(change(network, layer) for network in networks) / 3
    assert torch.allclose(out.double(), x.double() @ weight.T + layer.bias.double(), atol=2e-5)


def _means(pixels: Tensor, num_cells: int) -> Tensor:
    """Means (3, cells) over square cells of a picture of 96 x 64."""
    side = round((96 * 64 / num_cells) ** 0.5)
    return pixels.reshape(3, 96 // side, side, 64 // side, side).mean(dim=(2, 4)).flatten(1)


# --- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [TextForm(), TextForm("generate", 3), TextForm("train")])
def test_every_sub_prompt_is_encoded_with_its_own_network(own, form):
    model, networks = own
    request = replace(REQUEST, prompt=f"{REQUEST.prompt} AND a cross", negative="words, " * 60)
    regional = Regional(model.unet, networks, LEFT_RIGHT)
    got = encode_requests(model, [request], text_form=form, followers=[regional])
    assert got.num_parts(request) == 3
    alone = []
    for number, text in enumerate([*request.prompt.split(" AND "), request.negative]):
        for index, network in enumerate(networks):
            network.set_multiplier(1.0 if index == number else 0.0)
        # the negative goes along, since it decides how many chunks there are
        single = replace(request, prompt=text)
        alone.append(encode_requests(model, [single], text_form=form).text(single))
    for network in networks:
        network.set_multiplier(1.0)
    *parts, negative = alone
    assert torch.allclose(got.text(request).hidden_BTD, torch.cat([p.hidden_BTD for p in parts], dim=1), atol=1e-5)
    assert torch.allclose(got.text(request).pooled_BP, parts[-1].pooled_BP, atol=1e-5)
    found = got.text(request, negative=True)
    assert torch.allclose(found.hidden_BTD, torch.cat([negative.hidden_BTD] * 3, dim=1), atol=1e-5)
    assert torch.allclose(found.pooled_BP, negative.pooled_BP, atol=1e-5)
    plain = encode_requests(model, [replace(request, prompt="a red circle")], text_form=form)
    both = plain.text(replace(request, prompt="a red circle")).hidden_BTD
    assert not torch.allclose(both, parts[0].hidden_BTD, atol=1e-2), "the networks show"


# --- pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lora, dora, oft])
def test_one_network_everywhere_is_the_network_without_regions(bundle, kind):
    model = copy.copy(bundle)
    model.unet, model.text_encoder_1, model.text_encoder_2 = map(
        copy.deepcopy, (bundle.unet, bundle.text_encoder_1, bundle.text_encoder_2)
    )
    network = noisy(model, 1, kind).attach()
    assert network.count("unet") > 200
    request = replace(REQUEST, prompt="a red circle", scale=1.0)  # the negative prompt has no network's words
    white = torch.full((8, 8, 3), 255, dtype=torch.uint8)
    (plain,), (regional,) = drawn(model, [request], [network], None), drawn(model, [request], [network], white)
    assert np.abs(plain - regional).max() <= STEP
    network.set_multiplier(0.0)
    assert np.abs(plain - drawn(model, [request], [network], None)[0]).mean() > 5


def test_the_order_of_networks_with_their_prompts_and_masks_is_of_no_account(own):
    model, networks = own
    mask = LEFT_RIGHT.clone()
    mask[:, :16, 2] = 255
    request = replace(REQUEST, prompt="a red circle AND a blue star AND a cross")
    turned = replace(request, prompt="a blue star AND a red circle AND a cross")
    (one,), (other,) = (
        drawn(model, [request], networks, mask),
        drawn(model, [turned], networks[::-1], mask[..., [1, 0, 2]]),
    )
    assert np.abs(one - other).max() <= STEP
    for wrong in ((request, networks[::-1], mask), (request, networks, mask[..., [1, 0, 2]]), (turned, networks, mask)):
        assert np.abs(one - drawn(model, [wrong[0]], *wrong[1:])[0]).mean() > 1


def test_what_differs_follows_the_mask(own):
    model, networks = own
    request = replace(REQUEST, steps=1, scale=1.0)
    off, left, right = drawn(
        model, [replace(request, network_muls=m) for m in ((0.0,), (1.0, 0.0), (0.0, 1.0))], networks
    )
    for picture, near in ((left, slice(0, 28)), (right, slice(36, 64))):
        change = np.abs(picture - off).mean(axis=(0, 2))
        far = np.delete(change, np.r_[near, 28:36])
        assert change[near].mean() > 3 * far.mean() > 0


def test_regions_are_gone_after_a_batch_and_places_in_it_do_not_matter(own):
    model, networks = own
    before = [layer.processor for name, layer in model.unet.named_modules() if name.endswith("attn2")]
    plain = replace(REQUEST, prompt="a cat", steps=1)
    (first,) = drawn(model, [plain], networks, None)
    batch = [replace(REQUEST, seed=s, prompt=p, negative=n) for s, p, n in
             ((1, "a AND b", ""), (2, "red AND green", "bad"), (3, "x AND y", "z"))]  # fmt: skip
    three = replace(REQUEST, prompt="a AND b AND c", negative_scale=0.5, network_muls=(0.3,))
    a, b, c, _, again, *_ = drawn(model, [*batch, three, *batch], networks, batch_size=3)
    turned = drawn(model, batch[::-1], networks, batch_size=3)
    assert all(map(np.array_equal, (a, b, c), turned[::-1])) and np.array_equal(a, again)
    assert np.array_equal(drawn(model, [plain], networks, None)[0], first)
    assert before == [layer.processor for name, layer in model.unet.named_modules() if name.endswith("attn2")]
    adapters = [adapter for network in networks for adapter in network.adapters.values()]
    assert all(adapter.region is None and adapter.enabled for adapter in adapters)
    assert not any(module._forward_pre_hooks for module in model.unet.modules())


def test_sub_prompts_of_other_lengths_share_no_batch(bundle):
    two = replace(REQUEST, prompt="a circle, " * 40 + " AND a star", steps=1, scale=1.0)
    four = replace(two, prompt="a AND b AND c AND d")
    form = TextForm("generate", 2)  # two of 154 positions are as long as four of 77

    def pictures(batch_size):
        followers = [Regional(bundle.unet, [], LEFT_RIGHT)]
        made = generate(bundle, [two, four], batch_size=batch_size, followers=followers, conditioning=form)
        return [picture.tobytes() for _, picture in made]

    assert pictures(2) == pictures(1)


# --- the script --------------------------------------------------------------------------------------------------


def test_the_script_draws_regions_and_refuses_what_cannot_be_parted(bundle, tmp_path, capsys):
    files = []
    for number in (1, 2):
        files.append(str(tmp_path / f"{number}.safetensors"))
        save(noisy(bundle, number).export()[0], tmp_path / f"{number}.safetensors")
    mask, twice = tmp_path / "mask.png", tmp_path / "twice"
    Image.fromarray(LEFT_RIGHT.numpy()).save(mask)
    twice.mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(twice / f"{name}.png")
    base = ["--ckpt", "tiny", "--outdir", str(tmp_path / "out"), "--sequential_file_name", "--steps", "1",
            "--mask_path", str(mask), "--W", "64", "--H", "96", "--seed", "3"]  # fmt: skip
    both = ["--network_module", "networks.lora", "networks.lora", "--network_weights", *files]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle AND a blue star\na red circle AND a blue star --am 0\na AND b AND c --l 1\n")

    assert sdxl_gen_img.main([*base, *both, "--from_file", str(prompts)]) == 0
    over = [
        "--outdir",
        str(tmp_path),
        "--image_path",
        str(mask),
        "--strength",
        "1",
        "--highres_fix_scale",
        "0.5",
        "--highres_fix_steps",
        "1",
    ]
    assert sdxl_gen_img.main([*base, *both, *over, "--prompt", "x AND y --d 1"]) == 0
    log = capsys.readouterr().err
    assert "the whole of image_path is drawn anew" in log
    one, off, *_ = [np.asarray(Image.open(path)).astype(np.int16) for path in sorted((tmp_path / "out").glob("*.png"))]
    assert (tmp_path / "im_1000001.png").is_file() and np.abs(one - off).mean() > 1

    assert sdxl_gen_img.main([*base, *both, "--prompt", "a red circle"]) == 2
    assert "2 networks act in parts of the picture, and the prompt has 1" in capsys.readouterr().err
    foreign = ["--network_module", "lycoris.kohya", "networks.lora", "--network_weights", *files]
    assert sdxl_gen_img.main([*base, *foreign, "--prompt", "a AND b"]) == 2
    assert "lycoris.kohya acts everywhere" in capsys.readouterr().err
    assert sdxl_gen_img.main([*base, *both, "--mask_path", str(twice), "--prompt", "a AND b"]) == 2
    assert "mask_path names 2 pictures" in capsys.readouterr().err


def test_a_mask_of_networks_keeps_nothing_of_what_is_drawn_over(tmp_path):
    picture = str(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(picture)
    base = {"ckpt": "tiny", "prompt": "a", "image_path": picture, "mask_path": picture}
    network = {"network_module": ["networks.lora"], "network_weights": [picture]}
    for more, masks, count in (
        (network, [], 1),
        ({**network, "network_merge": True}, [picture], 0),
        ({}, [picture], 0),
    ):
        cfg = make_config("sdxl_gen_img", **base, **more)
        regions = read_regions(cfg)
        assert sources_of(cfg) == ([picture], masks) and (regions.count if regions else 0) == count
    three = {"network_module": ["networks.lora"] * 3, "network_weights": [picture] * 3, "network_merge_n_models": 1}
    assert read_regions(make_config("sdxl_gen_img", **base, **three)).count == 2
