"""Make pictures with the tiny SDXL: Euler steps and classifier-free guidance, nothing more."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tools.tiny import arch
from tools.tiny.train_vae import decode


@dataclass
class Models:
    """The four models; `token_ids` are the ids of the rows where the token tables are cut down."""

    unet: Any
    te1: Any
    te2: Any
    vae: Any
    token_ids: np.ndarray | None = None


def alphas_cumprod() -> torch.Tensor:
    """SDXL's noise schedule, float64 (1000,)."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)


def token_rows(models: Models, tokenizer, captions: list[str]) -> list[torch.Tensor]:
    """Token ids of both encoders, as rows of the tables that the models have."""
    ids = arch.tokenize(tokenizer, captions)
    if models.token_ids is not None:
        ids = tuple(np.searchsorted(models.token_ids, rows) for rows in ids)
    return [torch.from_numpy(np.ascontiguousarray(rows)) for rows in ids]


def euler(denoise, x: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Euler steps of the probability-flow ODE from unit noise; `denoise(x, t)` predicts the noise."""
    times = (torch.arange(num_steps) * (1000 // num_steps)).flip(0) + 1  # SDXL's leading spacing, offset 1
    alphas = alphas_cumprod()[times]
    sigmas = [*((1 - alphas) / alphas).sqrt().tolist(), 0.0]
    x = x * (sigmas[0] ** 2 + 1) ** 0.5
    for step, t in enumerate(times.tolist()):
        noise = denoise(x / (sigmas[step] ** 2 + 1) ** 0.5, t)
        x = x + noise * (sigmas[step + 1] - sigmas[step])
    return x


@torch.no_grad()
def sample(
    models: Models,
    tokenizer,
    captions: list[str],
    *,
    size: tuple[int, int] = (128, 128),
    num_steps: int = 10,
    scale: float = 4.0,
    seed: int = 0,
) -> np.ndarray:
    """Pictures for captions, uint8 (B, H, W, 3); `size` is (width, height)."""
    width, height = size
    count = len(captions)
    rows = token_rows(models, tokenizer, [*captions, ""])
    hidden, pooled = arch.encode_text(models.te1, models.te2, *rows)
    hidden = torch.cat([hidden[:-1], hidden[-1:].expand(count, -1, -1)])
    pooled = torch.cat([pooled[:-1], pooled[-1:].expand(count, -1)])
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(2 * count, -1)

    def denoise(x: torch.Tensor, t: int) -> torch.Tensor:
        both = arch.predict(models.unet, torch.cat([x, x]), torch.tensor(t), hidden, pooled, sizes)
        with_text, without = both.chunk(2)
        return without + scale * (with_text - without)

    noise = torch.randn(count, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return decode(models.vae, euler(denoise, noise, num_steps))
