"""Bits of rows in batches, with products that are made to depend on the batch."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from library.inference import batch_invariance, launch, texts
from library.inference.adapters import adapter_roots
from library.inference.batch_invariance import batch_invariant
from library.inference.request import GenRequest
from library.inference.steady_attention import steady_attention
from library.models.families import sdxl
from library.sizes import Size
from networks import dora, lora, oft


@pytest.fixture
def careless(monkeypatch):
    """A linear product whose last bits depend on the number of rows; returns the numbers of rows that it was given."""
    rows, real = [], torch.nn.functional.linear

    def linear(x, weight, bias=None):
        if has_torch_function((x,)):  # as torch's own functions do
            return handle_torch_function(linear, (x,), x, weight, bias)
        rows.append(len(x))
        return real(x, weight, bias) * (1 + len(x) * 2.0**-20)

    monkeypatch.setattr(batch_invariance.F, "linear", linear)
    monkeypatch.setattr(batch_invariance, "_WITH_WEIGHTS", (linear,))
    monkeypatch.setattr(batch_invariance, "_verdicts", {})
    return rows


def test_models_beside_it_are_watched_too(careless):
    g = torch.Generator().manual_seed(0)
    model, other, x = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 2)), torch.randn(6, 4, generator=g)
    with torch.no_grad():
        alone = [other(x[index::3]) for index in range(3)]
        with batch_invariant(model, 3, beside=[other]):
            together = other(x)
    assert all(torch.equal(together[index::3], alone[index]) for index in range(3))
    assert "forward" not in other[0].__dict__


@pytest.mark.parametrize("extended", [False, True], ids=["layers", "everywhere"])
def test_products_that_depend_on_the_batch_are_computed_apart(careless, extended):
    g = torch.Generator().manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.SiLU()), torch.randn(6, 4, generator=g)
    if extended:
        model[1].register_forward_hook(lambda module, args, out: 2 * out)
    with torch.no_grad():
        alone = [model(x[index::3]) for index in range(3)]  # two branches of guidance of three pictures
        together = model(x)
        assert not all(torch.equal(together[index::3], alone[index]) for index in range(3))
        with batch_invariant(model, 3):
            together = model(x)
            assert all(torch.equal(together[index::3], alone[index]) for index in range(3))
            careless.clear()
            model(x)
            assert careless == [2, 2, 2], "the shape is tried once"
        careless.clear()
        with batch_invariant(model, 1):
            model(x)
        model(x)
        assert careless == [6, 6]
    assert all("forward" not in module.__dict__ for module in model)


def test_products_that_do_not_are_computed_at_once(monkeypatch):
    calls, real = [], torch.nn.functional.linear
    monkeypatch.setattr(batch_invariance, "_verdicts", {})
    monkeypatch.setattr(batch_invariance.F, "linear", lambda x, *rest: calls.append(len(x)) or real(x * 1.0, *rest))
    layer = nn.Linear(64, 64)
    with torch.no_grad(), batch_invariant(layer, 2):
        layer.weight.zero_()  # the trial takes numbers of its own: zeros would hide what differs
        layer(torch.randn(4, 16, 64))
        calls.clear()
        layer(torch.randn(4, 16, 64))
        assert calls in ([4], [2, 2])
        (verdict,) = batch_invariance._verdicts[2, torch.get_num_threads()].values()
        assert (verdict == batch_invariance._AT_ONCE) == (calls == [4])


def test_products_with_and_without_a_bias_are_tried_apart(monkeypatch):
    """Two layers of one shape may be computed in two ways."""

    def linear(x, weight, bias=None):
        product = (x[:, None] * weight).sum(dim=-1)
        return product if bias is None else product * (1 + len(x) * 2.0**-20) + bias

    monkeypatch.setattr(batch_invariance.F, "linear", linear)
    monkeypatch.setattr(batch_invariance, "_verdicts", {})
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([model(row) for row in x.split(1)])
        assert not torch.equal(model(x), alone)
        with batch_invariant(model, 2):
            assert torch.equal(model(x), alone)


@pytest.mark.parametrize(("kind", "pictures"), [(dora, 2), (oft, 5)])
def test_networks_that_compute_with_weights_give_the_same_bits(bundle, kind, pictures):
    """DoRA multiplies weights, as many rows as there are; OFT turns the rows of activations block by block."""
    unet, g = copy.deepcopy(bundle.unet), torch.Generator().manual_seed(0)
    roots = adapter_roots(replace(bundle, unet=unet))
    alpha, args = (0.3, {"enable_conv": "true"}) if kind is oft else (4, {"conv_dim": "2"})
    network = kind.create(roots, dim=4, alpha=alpha, generator=g, args=args)
    for adapter in network.adapters.values():
        torch.nn.init.normal_(adapter.oft_blocks if kind is oft else adapter.lora_up.weight, std=0.1, generator=g)
    network.eval().attach()
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    rows = 2 * pictures  # two branches
    x, text = torch.randn(rows, 4, 8, 8, generator=g), torch.randn(rows, 77, 64, generator=g)[..., :1]
    text = text.expand(-1, -1, unet.config.cross_attention_dim).contiguous()
    added = {"text_embeds": torch.randn(rows, pooled, generator=g), "time_ids": torch.full((rows, 6), 64.0)}

    def predict(of: slice):
        part = {name: value[of] for name, value in added.items()}
        return unet(x[of], torch.tensor(500), encoder_hidden_states=text[of], added_cond_kwargs=part).sample

    with torch.no_grad():
        alone = [predict(slice(index, None, pictures)) for index in range(pictures)]
        with batch_invariant(unet, pictures):
            together = predict(slice(None))
    network.detach()
    assert all(torch.equal(together[index::pictures], alone[index]) for index in range(pictures))


def test_attention_computes_the_keys_of_a_text_once_and_leaves_nothing(bundle):
    unet, g = bundle.unet, torch.Generator().manual_seed(0)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    calls, real = [], layer.forward
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(1, pooled, generator=g), "time_ids": torch.full((1, 6), 64.0)}
    x = torch.randn(1, 4, 8, 8, generator=g)
    texts = [torch.randn(1, 77, unet.config.cross_attention_dim, generator=g) for _ in range(2)]

    def predict(text, t):
        return unet(x, torch.tensor([t]), encoder_hidden_states=text, added_cond_kwargs=added).sample

    with torch.no_grad():
        order = [(texts[0], 900.0), (texts[0], 100.0), (texts[1], 100.0), (texts[0], 100.0)]
        wanted = [predict(*given) for given in order]
        layer.__dict__["forward"] = own = lambda text: calls.append(1) or real(text)
        with steady_attention(unet):
            got = [predict(*given) for given in order]
        assert layer.__dict__.pop("forward") is own
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert all("forward" not in module.__dict__ for module in unet.modules())
    assert len(calls) == 3, "of four: twice in a row it was the same text"


@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_vectors_are_multiplied_in_stacks(bias):
    g = torch.Generator().manual_seed(0)
    layer, x = nn.Linear(24, 10, bias=bias), torch.randn(6, 24, generator=g)
    with torch.no_grad():
        stacked = batch_invariance._stacked(3, torch.nn.functional.linear, x, layer.weight, layer.bias)
        torch.testing.assert_close(stacked, layer(x))


@pytest.fixture(params=[1, 2])
def threads(request):
    """Products are divided among threads, some of them with the rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_decoded_pixels_have_the_bits_of_a_picture_alone(bundle, threads):
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = latents.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        alone = torch.cat([sdxl.decode_latents(bundle.vae, row) for row in latents.split(1)])
        with batch_invariant(bundle.vae, 3):
            together = sdxl.decode_latents(bundle.vae, latents)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("extended", [False, True], ids=["layers", "everywhere"])
def test_norms_and_what_follows_keep_the_memory_layout(threads, memory, extended):
    """Norms of channels that lie last are sums over pieces of all pictures together, one for each thread."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.SiLU())
    x = torch.randn(3, 4, 48, 48, generator=g).contiguous(memory_format=memory)
    if extended:
        model[2].register_forward_hook(lambda module, args, out: 2 * out)
    with torch.no_grad():
        alone = [model(batch_invariance._alone(x, slice(index, None, 3))) for index in range(3)]
        with batch_invariant(model, 3):
            together = model(x)
    assert all(torch.equal(together[index::3], alone[index]) for index in range(3))
    assert together.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("with_network", [False, True])
def test_texts_have_the_bits_that_they_have_alone(bundle, threads, with_network, monkeypatch):
    g, prompts = torch.Generator().manual_seed(0), ["a red circle", "a (green:1.3) star", "((blue)) cross", "", "x"]
    bundle = replace(bundle, text_encoder_1=copy.deepcopy(bundle.text_encoder_1))
    if with_network:
        network = lora.create(adapter_roots(bundle), dim=4, alpha=4, generator=g, args={})
        for adapter in network.adapters.values():
            torch.nn.init.normal_(adapter.lora_up.weight, std=0.1, generator=g)
        network.eval().attach()
    requests = [GenRequest(text, "blurry", Size(64, 64), 2, 5.0, 1, "euler") for text in prompts]
    calls, real = [], sdxl.encode_text_gen
    monkeypatch.setattr(sdxl, "encode_text_gen", lambda *args, **how: calls.append(len(args[3])) or real(*args, **how))
    together = launch.encode_requests(bundle, requests)
    assert calls == [6], "what all say is encoded once"
    monkeypatch.setattr(texts, "TEXTS_TOGETHER", 1)
    alone = launch.encode_requests(bundle, requests)
    if with_network:
        network.detach()
    assert calls == [6] + [1] * 6 and list(together.rows) == list(alone.rows)
    for one, other in zip(together.rows.values(), alone.rows.values(), strict=True):
        assert torch.equal(one.hidden_BTD, other.hidden_BTD) and torch.equal(one.pooled_BP, other.pooled_BP)
