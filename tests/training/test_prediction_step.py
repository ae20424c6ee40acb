"""One training step of each prediction type by hand, and that flow can be learned."""

from dataclasses import replace

import pytest
import torch

from library.models.families import sdxl
from tests.training.test_step import _batch, _draw, _step, bundle, make_trainable, trainable  # noqa: F401 (fixtures)

CASES = [
    ("epsilon", {}),
    ("v_prediction", {}),
    ("v_prediction", {"zero_terminal_snr": True}),
    ("rectified_flow", {"flow_shift": 2.0}),
]


@pytest.fixture
def typed(bundle):  # noqa: F811
    yield bundle
    bundle.set_prediction("epsilon")


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_the_loss_is_that_of_the_formulas(typed, trainable, kind, settings):  # noqa: F811
    """The mixture, what the U-Net is told, and the target, written out with the numbers of the papers."""
    typed.set_prediction(kind, **settings)
    batch = _batch(typed)
    draw = replace(_draw(batch), t_B=torch.tensor([0, 500, 999]))
    out = _step(typed, trainable)(batch, draw)
    x0, noise, t_B = batch.latents_B4hw * 0.13025, draw.noise_BChw, draw.t_B
    if kind == "rectified_flow":
        s_B111 = ((t_B + 1) / 1000).view(-1, 1, 1, 1)
        s_B111 = 2 * s_B111 / (1 + s_B111)
        noisy, told_B, target = (1 - s_B111) * x0 + s_B111 * noise, s_B111.flatten() * 1000, noise - x0
    else:
        signal_N = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0).sqrt()
        if settings:
            signal_N = (signal_N - signal_N[-1]) * signal_N[0] / (signal_N[0] - signal_N[-1])
        signal = signal_N[t_B].float().view(-1, 1, 1, 1)
        sigma = (1 - signal**2).sqrt()
        noisy, told_B = signal * x0 + sigma * noise, t_B
        target = noise if kind == "epsilon" else signal * noise - sigma * x0
    text = sdxl.encode_text(typed.text_encoder_1, typed.text_encoder_2, batch.tokens)
    with torch.no_grad():
        prediction = sdxl.predict(typed.unet, noisy, told_B, text, batch.sizes_B6)
    torch.testing.assert_close(out.loss_B, (prediction - target).pow(2).mean((1, 2, 3)), rtol=2e-4, atol=1e-6)


def test_a_lora_learns_flow_on_a_fixed_batch(typed, trainable):  # noqa: F811
    """The embedded model predicts noise; a few steps bring it nearer to the flow, step after step."""
    typed.set_prediction("rectified_flow")
    batch, losses = _batch(typed), []
    draw = replace(_draw(batch), t_B=torch.tensor([300, 800, 999]))
    step = _step(typed, trainable)
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(5):
        loss = step(batch, draw).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0], losses
