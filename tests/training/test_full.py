"""What the full fine-tune trains: blocks, rates and frozen parts, at full size and on the tiny model."""

import csv
import dataclasses
import io
from types import SimpleNamespace

import pytest
import torch

from library.config.cli import make_config
from library.errors import UserError
from library.models import memory, scratch
from library.models.arch import SDXL
from library.models.assemble import empty_module
from library.models.checkpoint import load_bundle
from library.training.trainables.full import FullTrainable

# spec block_lr.md section 1: block, tensors, parameters
BLOCKS = """0,8,7296000
1,2,11840
2,10,2255040
3,10,2255040
4,2,921920
5,58,27390080
6,56,29028480
7,2,3687040
8,218,375425280
9,216,381978880
10,10,31138560
11,206,350840320
12,10,31138560
13,218,400005120
14,218,400005120
15,220,406558720
16,58,37633280
17,58,33536000
18,60,35174400
19,12,4407040
20,12,3382400
21,12,3382400
22,4,12164"""


def _trainable(tmp_path, **changes):
    (tmp_path / "images" / "1_a").mkdir(parents=True, exist_ok=True)
    values = {
        "pretrained_model_name_or_path": "tiny",
        "train_data_dir": str(tmp_path / "images"),
        "resolution": 64,
        "output_dir": str(tmp_path),
        "learning_rate": 1e-5,
    }
    return FullTrainable(make_config("sdxl_train", **{**values, **changes}))


def test_blocks_of_the_full_size_unet(tmp_path):
    trainable = _trainable(tmp_path, block_lr=[(index + 1) * 1e-6 for index in range(23)])
    trainable.attach(SimpleNamespace(unet=empty_module(SDXL, "unet").requires_grad_(False)))
    groups = trainable.param_groups()
    expected = [tuple(map(int, row)) for row in csv.reader(io.StringIO(BLOCKS))]
    assert [group["name"] for group in groups] == [f"block{index}" for index, _, _ in expected]
    found = [(len(group["params"]), sum(p.numel() for p in group["params"])) for group in groups]
    assert found == [(tensors, parameters) for _, tensors, parameters in expected]
    assert [group["lr"] for group in groups] == [(index + 1) * 1e-6 for index in range(23)]
    assert sum(parameters for _, parameters in found) == 2_567_463_684


def test_block_rates_as_text(tmp_path):
    text = ",".join(["1e-5"] * 23)
    assert _trainable(tmp_path, block_lr=text).cfg.finetune.block_lr == (1e-5,) * 23
    with pytest.raises(UserError, match="has 22 values"):
        _trainable(tmp_path, block_lr=text[5:])


def test_backward_ends_where_nothing_before_trains(tmp_path):
    rates = [0.0] * 23
    rates[20] = 1e-5
    bundle = load_bundle("tiny", parts=("unet",))
    memory.freeze(bundle)
    _trainable(tmp_path, block_lr=rates).attach(bundle)
    grads = {}
    for name in ("conv_in", "mid_block", "up_blocks.0", "conv_out"):
        bundle.unet.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: grads.update({name: output.requires_grad})
        )
    text = torch.randn(1, 77, bundle.unet.config.cross_attention_dim)
    pooled = torch.randn(1, bundle.arch.text_encoder_2.projection)
    added = {"text_embeds": pooled, "time_ids": torch.ones(1, 6)}
    bundle.unet(torch.randn(1, 4, 8, 8), 5, encoder_hidden_states=text, added_cond_kwargs=added)
    assert grads == {"conv_in": False, "mid_block": False, "up_blocks.0": False, "conv_out": True}


def test_the_layer_behind_the_one_that_is_read_stays(tmp_path):
    bundle = load_bundle("tiny", parts=("text_encoders",))
    memory.freeze(bundle)
    trainable = _trainable(tmp_path, train_text_encoder=True, learning_rate=0.0, learning_rate_te1=1e-6)
    owned = trainable.attach(bundle)
    assert [name for name, _ in owned.named_children()] == ["text_encoder_1"]
    frozen = {name for name, p in bundle.text_encoder_1.named_parameters() if not p.requires_grad}
    last = bundle.text_encoder_1.config.num_hidden_layers - 1
    assert frozen and all(f"layers.{last}." in name or "final_layer_norm" in name for name in frozen)
    assert not any(p.requires_grad for p in bundle.text_encoder_2.parameters())
    (group,) = trainable.param_groups()
    assert group["name"] == "text_encoder1" and group["lr"] == 1e-6


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"cross_attention_dim": 1024}, "cross_attention_dim is 1024, the text encoders give"),
        ({"projection_class_embeddings_input_dim": 77}, "projection_class_embeddings_input_dim is 77"),
        ({"in_channels": 9}, "an inpainting model"),
        ({"addition_embed_type": None}, "takes no size ids"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, change, what):
    import json

    bundle = load_bundle("tiny", parts=("unet",))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**bundle.unet.config, **change}, default=list))
    beside = dataclasses.replace(bundle.arch, unet=None)
    with pytest.raises(UserError, match=what):
        scratch.unet_arch(path, beside)
