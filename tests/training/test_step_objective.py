"""What the settings about noise and loss do to a training step, alone and together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.config.cli import make_config
from library.data.types import Batch, SampleKey
from library.diffusion.huber import HuberThreshold
from library.diffusion.losses import huber, l1, smooth_l1
from library.diffusion.noise import NoiseSettings
from library.diffusion.schedule import NoiseSchedule
from library.diffusion.weighting import Weighting
from library.errors import UserError
from library.models import checkpoint, memory
from library.models.families import sdxl
from library.models.tokenizers import load_tokenizer
from library.sizes import Size
from library.training.draws import Draws
from library.training.objective import Objective
from library.training.step import TrainStep
from library.training.trainables.network import NetworkTrainable

KINDS = ("epsilon", "v_prediction")
NOISE = NoiseSettings(offset=0.1, offset_is_random=True, pyramid_iterations=3, perturbation=0.1)


def _config(tmp_path, **options):
    (tmp_path / "1_thing").mkdir(exist_ok=True)
    return make_config(
        "sdxl_train_network",
        pretrained_model_name_or_path="tiny",
        train_data_dir=str(tmp_path),
        output_dir=str(tmp_path),
        resolution=64,
        network_module="networks.lora",
        network_dim=4,
        learning_rate=1e-3,
        **options,
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model with a network that does something already."""
    bundle = checkpoint.load_bundle("tiny")
    memory.freeze(bundle)
    trainable = NetworkTrainable(_config(tmp_path_factory.mktemp("data"), network_train_unet_only=True))
    torch.manual_seed(0)
    trainable.attach(bundle)
    for name, weight in trainable.network.named_parameters():
        if "lora_up" in name:
            torch.nn.init.normal_(weight, std=0.02)
    yield bundle, trainable
    trainable.network.detach()


@pytest.fixture(params=KINDS)
def kind(request, parts):
    """Both predictions, one after the other."""
    bundle, _ = parts
    bundle.prediction_type = request.param
    yield request.param
    bundle.prediction_type = "epsilon"


def _batch(rows: int = 5, *, masked: bool = True) -> Batch:
    """Latents of unlike size and mean, a prior image of weight 0.3, and masks."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(rows, 4, 8, 8, generator=generator) * torch.linspace(3, 9, rows)[:, None, None, None] + 2
    captions = ["a red circle", "a blue square", "a green star", "a red star", "a square"]
    weight = torch.ones(rows)
    weight[1::3] = 0.3
    mask = torch.rand(rows, 1, 8, 8, generator=generator)
    tokens = sdxl.tokenize(load_tokenizer(), captions[:rows])
    return Batch(
        keys=[SampleKey(f"{row}.png", 0) for row in range(rows)],
        num_real=rows,
        weight_B=weight,
        captions=[],
        sizes_B6=torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(rows, 1),
        bucket=Size(64, 64),
        latents_B4hw=latents,
        tokens=tokens,
        mask_B1hw=mask if masked else None,
    )


def _rows(batch: Batch, rows: list[int], *, padding: int = 0) -> Batch:
    """Some rows of a batch, then `padding` copies of the first with other contents and no weight."""
    chosen = rows + rows[:1] * padding

    def take(tensor):
        return tensor[chosen].clone()

    weight = take(batch.weight_B)
    latents = take(batch.latents_B4hw)
    if padding:
        weight[-padding:] = 0
        latents[-padding:] *= -50
    tokens = replace(batch.tokens, ids_1_BnL=take(batch.tokens.ids_1_BnL), ids_2_BnL=take(batch.tokens.ids_2_BnL))
    return replace(
        batch,
        keys=[batch.keys[row] for row in chosen],
        num_real=len(rows),
        weight_B=weight,
        sizes_B6=take(batch.sizes_B6),
        latents_B4hw=latents,
        tokens=tokens,
        mask_B1hw=None if batch.mask_B1hw is None else take(batch.mask_B1hw),
    )


def _draw(batch: Batch, noise: NoiseSettings = NOISE):
    return Draws(3, noise=noise).make(batch.keys, 0, latent_shape=(4, 8, 8), posterior=False)


def _step(parts, **options) -> TrainStep:
    bundle, trainable = parts
    return TrainStep(bundle, trainable, trainable.network, objective=Objective(**options), with_text=True)


def _gradient(parts) -> torch.Tensor:
    network = parts[1].network
    flat = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    network.zero_grad()
    return flat


def _by_hand(parts, batch: Batch, draw, noise, given):
    """Prediction and target of a step whose target holds `noise` and whose input holds `given`."""
    bundle, _ = parts
    alphas = bundle.schedule.alphas_cumprod_N[draw.t_B].float().view(-1, 1, 1, 1)
    x0 = batch.latents_B4hw * 0.13025
    text = sdxl.encode_text(bundle.text_encoder_1, bundle.text_encoder_2, batch.tokens)
    noisy = alphas.sqrt() * x0 + (1 - alphas).sqrt() * given
    prediction = bundle.unet(
        noisy,
        draw.t_B,
        encoder_hidden_states=text.hidden_BTD,
        added_cond_kwargs={"text_embeds": text.pooled_BP, "time_ids": batch.sizes_B6},
    ).sample
    target = noise if bundle.prediction_type == "epsilon" else alphas.sqrt() * noise - (1 - alphas).sqrt() * x0
    return noisy, prediction, target


@torch.no_grad()
def test_offset_pyramid_and_perturbation_enter_input_and_target_as_they_should(parts, kind):
    batch = _batch(masked=False)
    draw = _draw(batch)
    extras, x0 = draw.extras, batch.latents_B4hw * 0.13025
    strength = (extras.offset_strength_B[:, None] + 0.2 * x0.mean((2, 3)).abs()).clamp(min=0)
    noise = draw.noise_BChw + (strength * extras.offset_BC)[:, :, None, None] + extras.pyramid_BChw
    noise = noise / noise.flatten(1).std(dim=1).view(-1, 1, 1, 1)
    _, prediction, target = _by_hand(parts, batch, draw, noise, noise + extras.perturbation_BChw)
    out = _step(parts, adaptive_noise_scale=0.2)(batch, draw)
    torch.testing.assert_close(out.loss_B, (prediction - target).pow(2).mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_mask_prior_weight_and_timestep_weights_act_together_in_their_order(parts, kind):
    batch = _batch()
    draw = _draw(batch, NoiseSettings())
    weighting = Weighting(min_snr_gamma=2.0, debiased=True)
    _, prediction, target = _by_hand(parts, batch, draw, draw.noise_BChw, draw.noise_BChw)
    snr = parts[0].schedule.snr(draw.t_B)
    c = (0.9 * (snr.sqrt() / (snr.sqrt() + 1)) ** 2 + 0.1).float().view(-1, 1, 1, 1) * 3
    elementwise = 2 * c * (((prediction - target) ** 2 + c**2).sqrt() - c)
    rows = (elementwise * batch.mask_B1hw).mean((1, 2, 3))
    factor = weighting.factor(snr, kind).float()
    out = _step(parts, loss=huber.elementwise, threshold=HuberThreshold(0.1, 3.0, "snr"), weighting=weighting)(
        batch, draw
    )
    torch.testing.assert_close(out.loss_B, rows, rtol=1e-4, atol=1e-7)
    assert float(out.loss) == pytest.approx(float((rows * batch.weight_B * factor).sum() / 5), rel=1e-4)
    assert factor.unique().numel() == 5 and batch.weight_B.unique().numel() == 2


@torch.no_grad()
def test_each_weighting_moves_the_loss_and_leaves_the_logged_rows_alone(parts, kind):
    batch = _batch()
    draw = _draw(batch)
    plain = _step(parts)(batch, draw)
    choices = [{"min_snr_gamma": 5.0}, {"soft_min_snr_gamma": 5.0}, {"p2_gamma": 1.0}, {"debiased": True}]
    choices.append({"scale_v_like_noise": True} if kind == "v_prediction" else {"v_like_loss": 0.5})
    for choice in choices:
        out = _step(parts, weighting=Weighting(**choice))(batch, draw)
        assert torch.equal(out.loss_B, plain.loss_B), choice
        factor = Weighting(**choice).factor(parts[0].schedule.snr(draw.t_B), kind).float()
        expected = (plain.loss_B * factor * batch.weight_B).mean()
        assert float(out.loss) == pytest.approx(float(expected), rel=1e-5), choice
        assert float(out.loss) != pytest.approx(float(plain.loss), rel=1e-2), choice


def test_dream_trains_on_what_the_model_left_of_the_noise(parts, kind):
    """And takes that for given: its gradient is not that of the first pass."""
    batch = _batch(masked=False)
    draw = _draw(batch, NoiseSettings(perturbation=0.1))
    given = draw.noise_BChw + draw.extras.perturbation_BChw
    with torch.no_grad():
        noisy, first, _ = _by_hand(parts, batch, draw, draw.noise_BChw, given)
    alphas = parts[0].schedule.alphas_cumprod_N[draw.t_B].float().view(-1, 1, 1, 1)
    signal, sigma = alphas.sqrt(), (1 - alphas).sqrt()
    foreseen = first if kind == "epsilon" else sigma * noisy + signal * first
    change = sigma**1.5 * (draw.noise_BChw - foreseen)
    again, prediction, target = _by_hand(parts, batch, draw, draw.noise_BChw + change, given + change)
    torch.testing.assert_close(again, noisy + sigma * change, rtol=0, atol=1e-5)
    out = _step(parts, dream=1.5)(batch, draw)
    loss_B = (prediction - target).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(out.loss_B, loss_B.detach(), rtol=1e-3, atol=1e-6)
    (loss_B * batch.weight_B).mean().backward()
    expected = _gradient(parts)
    out.loss.backward()
    assert float((_gradient(parts) - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_first_pass_of_dream_takes_no_gradient_from_the_second(parts, dtype):
    """Autocast must not hand the casts of the pass without gradients to the one with them."""
    batch = _batch(2, masked=False)
    missing = {}
    for dream in (None, 1.0):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            out = _step(parts, dream=dream)(batch, _draw(batch))
        out.loss.backward()
        named = parts[1].network.named_parameters()
        missing[dream] = [name for name, p in named if p.requires_grad and p.grad is None]
        parts[1].network.zero_grad()
    assert missing == {None: [], 1.0: []}


ALL = {
    "loss": smooth_l1.elementwise,
    "threshold": HuberThreshold(0.2, 1.5, "exponential"),
    "weighting": Weighting(min_snr_gamma=5.0, debiased=True),
    "mask_by_area": True,
    "adaptive_noise_scale": 0.1,
}


def test_padding_rows_change_neither_loss_nor_gradient(parts, kind):
    batch = _batch()
    found = []
    for given in (_rows(batch, [0, 1, 2]), _rows(batch, [0, 1, 2], padding=2)):
        out = _step(parts, **ALL, dream=1.0)(given, _draw(given))
        out.loss.backward()
        found.append((out.loss.detach(), _gradient(parts)))
    (loss, gradient), (padded_loss, padded_gradient) = found
    torch.testing.assert_close(padded_loss, loss, rtol=1e-5, atol=0)
    assert float((padded_gradient - gradient).norm() / gradient.norm()) < 1e-5


def test_accumulation_with_a_short_batch_gives_the_gradient_of_the_whole_batch(parts, kind):
    """As the loop does it: each micro-batch counts with its share of the step's samples."""
    batch = _batch()
    step = _step(parts, **ALL, dream=1.0)
    step(batch, _draw(batch)).loss.backward()
    whole = _gradient(parts)
    for cut in ([0, 1], [2, 3], [4]):
        part = _rows(batch, cut, padding=2 - len(cut))
        (step(part, _draw(part)).loss * (part.num_real / len(batch))).backward()
    assert float((_gradient(parts) - whole).abs().max()) < 1e-6
    assert float(whole.abs().max()) > 1e-4, "there is something to compare"


def test_a_schedule_without_final_signal_gives_finite_weights_and_gradients(parts, kind):
    bundle, _ = parts
    plain = bundle.schedule
    bundle.schedule = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
    try:
        batch = _batch(2)
        draw = replace(_draw(batch), t_B=torch.tensor([999, 500]))
        outs = [_step(parts, weighting=Weighting(**{name: 2.0}))(batch, draw) for name in ("min_snr_gamma", "p2_gamma")]
        outs.append(_step(parts, weighting=Weighting(debiased=True), loss=huber.elementwise)(batch, draw))
        for out in outs:
            out.loss.backward()
            assert torch.isfinite(out.loss) and bool(torch.isfinite(_gradient(parts)).all())
    finally:
        bundle.schedule = plain


@pytest.mark.parametrize(
    ("objective", "prediction_type", "what"),
    [
        (Objective(weighting=Weighting(scale_v_like_noise=True)), "epsilon", "scale_v_pred_loss_like_noise_pred"),
        (Objective(weighting=Weighting(v_like_loss=0.5)), "v_prediction", "v_pred_like_loss"),
        (Objective(weighting=Weighting(min_snr_gamma=5.0)), "rectified_flow", "min_snr_gamma"),
        (Objective(weighting=Weighting(debiased=True)), "rectified_flow", "debiased_estimation_loss"),
        (Objective(dream=1.0), "rectified_flow", "dream_training"),
    ],
)
def test_what_has_no_meaning_for_a_prediction_is_refused(objective, prediction_type, what):
    with pytest.raises(UserError) as caught:
        objective.check(prediction_type)
    (problem,) = caught.value.problems
    assert problem.what.startswith(what) and problem.fix


def test_everything_else_is_allowed():
    for prediction_type in (*KINDS, "rectified_flow"):
        Objective(loss=huber.elementwise, adaptive_noise_scale=0.1).check(prediction_type)
    for prediction_type in KINDS:
        Objective(weighting=Weighting(min_snr_gamma=5.0, debiased=True), dream=1.0).check(prediction_type)
    Objective(weighting=Weighting(scale_v_like_noise=True)).check("v_prediction")
    Objective(weighting=Weighting(v_like_loss=0.5)).check("epsilon")


def test_a_loss_may_live_in_a_package_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_losses").mkdir()
    (tmp_path / "my_losses" / "scaled.py").write_text(
        "def elementwise(pred, target, threshold_B111):\n    return (pred - target).abs() * threshold_B111\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    objective = Objective.of(_config(tmp_path, loss_type="my_losses.scaled", huber_c=0.5, huber_schedule="constant"))
    prediction, target = torch.randn(2, 3, 4, 2, 2)
    rows = objective.row_losses(prediction, target, None, t_B=torch.tensor([1, 2, 3]), schedule=None)
    torch.testing.assert_close(rows, (prediction - target).abs().mean((1, 2, 3)) * 0.5)
    with pytest.raises(UserError, match="my_loses"):
        Objective.of(_config(tmp_path, loss_type="my_loses.scaled"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Objective()),
        ({"loss_type": "l1"}, Objective(loss=l1.elementwise)),
        (
            {"loss_type": "huber", "huber_c": 0.2, "huber_scale": 3.0, "huber_schedule": "constant"},
            Objective(loss=huber.elementwise, threshold=HuberThreshold(0.2, 3.0, "constant")),
        ),
        ({"min_snr_gamma": 5.0}, Objective(weighting=Weighting(min_snr_gamma=5.0))),
        ({"soft_min_snr_gamma": 4.0}, Objective(weighting=Weighting(soft_min_snr_gamma=4.0))),
        ({"p2_gamma": 0.5, "p2_k": 2.0}, Objective(weighting=Weighting(p2_gamma=0.5, p2_k=2.0))),
        ({"scale_v_pred_loss_like_noise_pred": True}, Objective(weighting=Weighting(scale_v_like_noise=True))),
        ({"v_pred_like_loss": 0.5}, Objective(weighting=Weighting(v_like_loss=0.5))),
        ({"debiased_estimation_loss": True}, Objective(weighting=Weighting(debiased=True))),
        ({"noise_offset": 0.1, "adaptive_noise_scale": 0.2}, Objective(adaptive_noise_scale=0.2)),
        ({"dream_training": True}, Objective(dream=1.0)),
        ({"dream_training": True, "dream_detail_preservation": 0.0}, Objective(dream=0.0)),
        ({"alpha_mask": True, "masked_loss_normalize": "area"}, Objective(mask_by_area=True)),
    ],
)
def test_settings_reach_the_objective(tmp_path, options, expected):
    assert Objective.of(_config(tmp_path, **options)) == expected
