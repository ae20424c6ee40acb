"""From training to drawing: a small network that learns each prediction type draws what it was trained on."""

import pytest
import torch
from torch import nn

from library.diffusion.targets import training_target
from library.inference import samplers
from library.inference.denoise import denoise
from library.models.prediction import schedule_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and NumPy 2

DATA_C = torch.tensor([1.0, -0.5, 0.3, -1.2])


class SmallNet(nn.Module):
    """(x, timestep) -> prediction for latents of one cell, from x and sinusoids of the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))

    def forward(self, x_BChw, timestep_B):
        angles = timestep_B.float().view(-1, 1) / 1000 * torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128])
        return self.body(torch.cat([x_BChw.flatten(1), angles.sin(), angles.cos()], 1)).view(x_BChw.shape)


@pytest.mark.parametrize(
    ("kind", "settings", "sampler"),
    [
        ("epsilon", {}, "ddim"),
        ("v_prediction", {"zero_terminal_snr": True}, "ddim"),
        ("rectified_flow", {}, "euler"),
        ("rectified_flow", {"flow_shift": 3.0}, "dpmsolver++"),
    ],
)
def test_what_is_learned_is_drawn(kind, settings, sampler):
    """A wrong sign or timestep anywhere between training target and sampler would draw something else."""
    schedule = schedule_for(kind, **settings)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net, losses = SmallNet(), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(400):
        noise = torch.randn(128, 4, 1, 1, generator=generator)
        t_B = torch.randint(0, 1000, (128,), generator=generator)
        x0 = DATA_C.view(1, 4, 1, 1).expand(128, -1, -1, -1)
        prediction = net(schedule.add_noise(x0, noise, t_B), schedule.timestep(t_B))
        loss = (prediction - training_target(kind, schedule=schedule, x0=x0, noise=noise, t=t_B)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) / 20 < 0.2 * losses[0]
    generators = [torch.Generator().manual_seed(seed) for seed in range(16)]
    scheduler = samplers.make_scheduler(sampler, prediction_type=kind, steps=20, schedule=schedule)
    start = samplers.start_noise(generators, (4, 1, 1))
    drawn = denoise(lambda x, t: net(x, t.expand(len(x))), start, scheduler, generators=generators)
    off = (drawn.flatten(1) - DATA_C).abs()
    assert off.mean() < 0.1
