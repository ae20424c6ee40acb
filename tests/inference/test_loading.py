"""How a model is loaded, and what of it is compiled."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import sdxl_gen_img
from library.errors import UserError
from library.inference import launch
from library.inference.batch_invariance import is_compiled
from library.inference.decoding import Decoder, decoded, fits_beside
from library.inference.launch import generate
from library.inference.loading import Loading, compile_blocks, load_for_drawing
from library.inference.request import GenRequest
from library.inference.texts import Conditioning, TextForm
from library.sizes import Size

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

REQUEST = GenRequest("a red circle", "green", Size(64, 64), 2, 5.0, 1, "euler_a")


def test_a_model_is_loaded_as_it_was_asked_for():
    how = Loading(torch.bfloat16, vae_float32=True, channels_last=True, tiling=True)
    bundle = load_for_drawing("tiny", how, device="cpu")
    assert bundle.unet.dtype == bundle.text_encoder_2.dtype == torch.bfloat16 and bundle.vae.dtype == torch.float32
    assert not any(
        module.training or module.weight.requires_grad for module in (bundle.unet.conv_in, bundle.vae.quant_conv)
    )
    for convolution in (bundle.unet.down_blocks[0].resnets[0].conv1, bundle.vae.decoder.conv_in):
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
        assert not convolution.weight.is_contiguous()
    assert bundle.vae.use_tiling
    with pytest.raises(UserError, match="xformers needs a CUDA device"):
        load_for_drawing("tiny", Loading(xformers=True), device="cpu")


def test_compiled_blocks_draw_the_same(lora_file):
    from library.inference.adapters import load_networks

    bundle = load_for_drawing("tiny", Loading(), device="cpu")
    (network,) = load_networks(bundle, modules=["networks.lora"], weights=[str(lora_file)])
    requests = [REQUEST, replace(REQUEST, network_muls=(0.0,))]
    wanted = [np.asarray(picture).astype(int) for _, picture in generate(bundle, requests, networks=[network])]
    seen = []

    def backend(graph, example_inputs):
        seen.append(len(graph.graph.nodes))
        return graph.forward

    compile_blocks(bundle, backend=backend)
    assert is_compiled(bundle.unet.modules()) and not is_compiled(bundle.vae.modules())
    got = [np.asarray(picture).astype(int) for _, picture in generate(bundle, requests, networks=[network])]
    assert seen, "blocks were compiled"
    for one, other in zip(got, wanted, strict=True):
        assert np.abs(one - other).max() <= 1
    assert np.abs(wanted[0] - wanted[1]).mean() > 1, "and the network acts in them"


def test_the_options_reach_the_model(tmp_path, monkeypatch):
    seen = []
    real = launch.generate

    def looked_at(bundle, *args, **kwargs):
        seen.append(bundle)
        return real(bundle, *args, **kwargs)

    monkeypatch.setattr("library.inference.run.generate", looked_at)
    argv = f"--ckpt tiny --prompt red --steps 1 --W 64 --H 64 --outdir {tmp_path}".split()
    assert sdxl_gen_img.main([*argv, "--opt_channels_last", "--vae_tiling"]) == 0
    (bundle,) = seen
    assert not bundle.unet.conv_in.weight.is_contiguous() and bundle.vae.use_tiling
    compiled = []
    monkeypatch.setattr("library.inference.run.compile_blocks", compiled.append)
    assert sdxl_gen_img.main([*argv, "--compile"]) == 0
    assert len(seen) == 2 and [id(model) for model in compiled] == [id(seen[1])]
    assert seen[1].unet.conv_in.weight.is_contiguous() and not seen[1].vae.use_tiling


@pytest.mark.parametrize("beside", [False, True])
def test_pictures_come_in_order_wherever_they_are_decoded(bundle, beside, monkeypatch):
    requests = [replace(REQUEST, seed=seed, steps=1 + seed % 2) for seed in range(5)]
    wanted = [(request.seed, picture.tobytes()) for request, picture in generate(bundle, requests)]
    monkeypatch.setattr(launch, "Decoder", lambda bundle, at_once: Decoder(bundle, at_once, beside=beside))
    got = [(request.seed, picture.tobytes()) for request, picture in generate(bundle, requests, batch_size=2)]
    assert got == wanted and [seed for seed, _ in got] == [0, 1, 2, 3, 4]
    early = generate(bundle, requests)
    next(early)
    early.close()  # who stops looking leaves no thread behind


def test_what_breaks_while_decoding_reaches_who_asked(bundle, monkeypatch):
    monkeypatch.setattr("library.inference.decoding.decoded", lambda *_: 1 / 0)
    with Decoder(bundle, 1, beside=True) as decoder:
        wait = decoder.begin(torch.zeros(1, 4, 8, 8))
        decoder.wait()
        with pytest.raises(ZeroDivisionError):
            wait()


def test_decoding_goes_on_beside_the_drawing_where_both_fit():
    assert fits_beside(drawing=10, decoding=8, idle=5, room=15)
    assert not fits_beside(drawing=10, decoding=8, idle=5, room=14)


def test_texts_are_encoded_in_parts_that_cut_no_batch(bundle, monkeypatch):
    monkeypatch.setattr(launch, "TEXTS_AT_ONCE", 4)
    steps = [2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]
    requests = [replace(REQUEST, steps=number, prompt=str(index)) for index, number in enumerate(steps)]
    sizes = [len(part) for part in launch._parts(requests, 3)]
    assert sizes == [6, 6, 1] and [len(part) for part in launch._parts(requests, 1)] == [4, 4, 4, 1]
    assert not list(launch._parts([], 1))
    texts = Conditioning(TextForm(), max_rows=5)
    drawn = list(generate(bundle, [replace(request, steps=1) for request in requests], conditioning=texts))
    assert len(drawn) == 13 and len(texts.rows) == 5
    kept = [words for (words, *_), *_ in texts.rows]
    assert kept[-1] == "12" and "green" in kept and "0" not in kept, "what is asked for again and again stays"
    few = Conditioning(TextForm(), max_rows=2)
    assert len(list(generate(bundle, requests[:3], conditioning=few))) == 3, "what is to be drawn stays"
    everything = launch.encode_requests(bundle, requests)
    monkeypatch.setattr(bundle, "text_encoder_1", None)
    assert len(list(generate(bundle, requests[:1], conditioning=everything))) == 1, "encoders are not needed then"


def test_decoded_pictures_do_not_depend_on_how_many_are_decoded(bundle):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    one = [picture.tobytes() for picture in decoded(bundle, latents, 1)]
    assert one == [picture.tobytes() for picture in decoded(bundle, latents, 3)]
