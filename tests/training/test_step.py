"""One training step by hand against `TrainStep`, and what training must never touch."""

from dataclasses import replace

import pytest
import torch

from library.config.cli import make_config
from library.data.types import Batch, SampleKey
from library.inference.adapters import adapter_roots
from library.models import checkpoint, memory
from library.models.families import sdxl
from library.sizes import Size
from library.training.draws import Draws
from library.training.objective import Objective
from library.training.step import TrainStep
from library.training.trainables.network import NetworkTrainable


@pytest.fixture(scope="module")
def bundle():
    loaded = checkpoint.load_bundle("tiny")
    memory.freeze(loaded)
    return loaded


@pytest.fixture
def make_trainable(tmp_path):
    (tmp_path / "1_thing").mkdir()

    def make(**options):
        return NetworkTrainable(
            make_config(
                "sdxl_train_network",
                pretrained_model_name_or_path="tiny",
                train_data_dir=str(tmp_path),
                output_dir=str(tmp_path),
                resolution=64,
                network_module="networks.lora",
                **options,
            )
        )

    return make


@pytest.fixture
def trainable(bundle, make_trainable):
    made = make_trainable(network_dim=4)
    torch.manual_seed(0)
    made.attach(bundle)
    yield made
    made.network.detach()


def _batch(bundle, *, rows=3, real=None):
    tokens = sdxl.tokenize(bundle.tokenizer, ["a red circle", "a blue square", "a green star"][:rows])
    weight = torch.ones(rows)
    real = real or rows
    weight[real:] = 0
    generator = torch.Generator().manual_seed(5)
    return Batch(
        keys=[SampleKey(f"{row}.png", 0) for row in range(rows)],
        num_real=real,
        weight_B=weight,
        captions=[],
        sizes_B6=torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(rows, 1),
        bucket=Size(64, 64),
        latents_B4hw=torch.randn(rows, 4, 8, 8, generator=generator) * 7,
        tokens=tokens,
    )


def _draw(batch, epoch=0):
    return Draws(1).make(batch.keys, epoch, latent_shape=(4, 8, 8), posterior=False)


def _step(bundle, trainable, **options):
    return TrainStep(bundle, trainable, trainable.network, objective=Objective(**options), with_text=True)


def test_the_loss_is_the_mean_squared_error_of_the_noise(bundle, trainable):
    batch = _batch(bundle)
    draw = _draw(batch)
    out = _step(bundle, trainable)(batch, draw)
    alphas = bundle.schedule.alphas_cumprod_N[draw.t_B].float().view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * batch.latents_B4hw * 0.13025 + (1 - alphas).sqrt() * draw.noise_BChw
    text = sdxl.encode_text(bundle.text_encoder_1, bundle.text_encoder_2, batch.tokens)
    prediction = bundle.unet(
        noisy,
        draw.t_B,
        encoder_hidden_states=text.hidden_BTD,
        added_cond_kwargs={"text_embeds": text.pooled_BP, "time_ids": batch.sizes_B6},
    ).sample
    expected = (prediction - draw.noise_BChw).pow(2).mean((1, 2, 3))
    assert torch.allclose(out.loss_B, expected, rtol=1e-4)
    assert float(out.loss.detach()) == pytest.approx(float(expected.detach().mean()), rel=1e-4)


@pytest.mark.parametrize("by_area", [False, True])
def test_a_mask_of_ones_is_no_mask_bit_for_bit(bundle, trainable, by_area):
    batch = _batch(bundle)
    masked = replace(batch, mask_B1hw=torch.ones(3, 1, 8, 8))
    outs = [_step(bundle, trainable, mask_by_area=by_area)(given, _draw(batch)) for given in (batch, masked)]
    assert torch.equal(outs[0].loss_B, outs[1].loss_B) and torch.equal(outs[0].loss, outs[1].loss)


@pytest.mark.parametrize("by_area", [False, True])
def test_a_black_mask_takes_the_weight_of_its_row(bundle, trainable, by_area):
    batch = _batch(bundle)
    mask_B1hw = torch.ones(3, 1, 8, 8)
    mask_B1hw[1] = 0
    mask_B1hw[2, :, 4:] = 0
    step = _step(bundle, trainable, mask_by_area=by_area)
    whole, masked = step(batch, _draw(batch)), step(replace(batch, mask_B1hw=mask_B1hw), _draw(batch))
    assert masked.loss_B[0] == whole.loss_B[0] and masked.loss_B[1] == 0
    assert masked.loss_B[2] != whole.loss_B[2]
    assert float(masked.loss.detach()) == pytest.approx(float(masked.loss_B.mean()), rel=1e-6)


def test_padding_rows_do_not_count(bundle, trainable):
    whole, padded = _batch(bundle, rows=2), _batch(bundle, rows=3, real=2)
    padded.latents_B4hw[:2] = whole.latents_B4hw
    step = _step(bundle, trainable)
    assert float(step(whole, _draw(whole)).loss.detach()) == pytest.approx(
        float(step(padded, _draw(padded)).loss.detach()), rel=1e-5
    )


def test_a_sample_draws_the_same_whatever_batch_it_is_in(bundle):
    batch = _batch(bundle)
    together = _draw(batch)
    for row in range(3):
        alone = Draws(1).make(batch.keys[row : row + 1], 0, latent_shape=(4, 8, 8), posterior=True)
        assert torch.equal(alone.noise_BChw[0], together.noise_BChw[row])
        assert alone.t_B[0] == together.t_B[row]
        assert not torch.equal(alone.posterior_BChw, alone.noise_BChw)
    assert not torch.equal(_draw(batch, epoch=1).noise_BChw, together.noise_BChw)


def test_only_the_adapters_get_gradients_and_the_base_stays_bit_identical(bundle, trainable):
    before = {name: value.clone() for name, value in bundle.unet.state_dict().items()}
    step = _step(bundle, trainable)
    optimizer = torch.optim.AdamW([p for g in trainable.param_groups() for p in g["params"]], lr=0.1)
    batch = _batch(bundle)
    for _ in range(2):
        step(batch, _draw(batch)).loss.backward()
        optimizer.step()
    after = bundle.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for part in (bundle.unet, bundle.text_encoder_1) for p in part.parameters())
    missing = [name for name, p in trainable.network.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"DDP would wait for {missing[:3]}"


def test_frozen_weights_are_not_broadcast_by_ddp(bundle, trainable):
    step = _step(bundle, trainable)
    ignored = set(step._ddp_params_and_buffers_to_ignore)
    trained = {name for name, p in step.named_parameters() if p.requires_grad}
    assert trained and trained.isdisjoint(ignored)
    assert {name for name, _ in step.named_parameters()} == trained | (ignored & dict(step.named_parameters()).keys())


def test_rates_decide_which_parts_train(bundle, make_trainable):
    parts = make_trainable
    assert parts(learning_rate=1e-4).trains == {"te1", "te2", "unet"}
    assert parts(learning_rate=1e-4, network_train_unet_only=True).trains == {"unet"}
    assert parts(learning_rate=1e-4, text_encoder_lr=[0.0]).trains == {"unet"}
    assert parts(learning_rate=1e-4, text_encoder_lr=[1e-5, 0.0]).trains == {"te1", "unet"}
    assert parts(learning_rate=1e-4, unet_lr=0.0).trains == {"te1", "te2"}
    both = parts(learning_rate=1e-4, text_encoder_lr=[1e-5, 2e-5], unet_lr=3e-4)
    both.attach(bundle)
    try:
        assert [(group["name"], group["lr"]) for group in both.param_groups()] == [
            ("textencoder1", 1e-5),
            ("textencoder2", 2e-5),
            ("unet", 3e-4),
        ]
    finally:
        both.network.detach()


def test_names_are_unique_over_all_parts(bundle):
    assert [root.prefix for root in adapter_roots(bundle)] == ["lora_te1", "lora_te2", "lora_unet"]


def test_a_sample_that_is_not_finite_carries_no_weight_and_is_counted(bundle, trainable):
    good, bad = _batch(bundle, rows=3, real=2), _batch(bundle, rows=3)
    bad.latents_B4hw[2, 0, 3, 3] = float("nan")
    step = _step(bundle, trainable)
    expected, out = step(good, _draw(good)), step(bad, _draw(bad))
    assert float(out.not_finite) == 1 and float(expected.not_finite) == 0
    assert float(out.loss.detach()) == pytest.approx(float(expected.loss.detach()) * 2 / 3, rel=1e-5)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable.network.parameters() if p.grad is not None)
    trainable.network.zero_grad()
