"""Train the tiny U-Net and both text encoders together on latents of drawn pictures."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tools.tiny import arch, scorer, world
from tools.tiny.files import load_file, progress, save_file
from tools.tiny.sample import Models, alphas_cumprod, sample, token_rows
from tools.tiny.train_vae import encode

# (width, height): number of pictures, which is also how often a batch has this size.
SIZES = {(128, 128): 14_000, (96, 160): 3_000, (160, 96): 3_000}
PEAK_RATE, WARM_UP, EMA_DECAY, FLOOR = 1.2e-3, 100, 0.998, 0.03
PARTS = ("unet", "te1", "te2")


def load_vae(work: Path) -> nn.Module:
    vae = arch.build_vae()
    vae.load_state_dict(load_file(work / "vae.pt"))
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def make_latents(work: Path, *, seed: int, log: Callable[[str], None]) -> None:
    """Draw the training pictures and write `latents.pt`: per size latents, captions and size ids."""
    vae, started = load_vae(work), time.monotonic()
    found = []
    for index, ((width, height), count) in enumerate(SIZES.items()):
        rng = np.random.default_rng([seed, 10 + index])
        latents, captions, sizes = [], [], []
        for begin in range(0, count, 100):
            rows = [world.draw(rng, width=width, height=height) for _ in range(min(100, count - begin))]
            latents.append(encode(vae, np.stack([row[0] for row in rows])))
            captions += [row[1] for row in rows]
            sizes += [row[2] for row in rows]
            if begin % 2000 == 0:
                log(f"latents {width}x{height}: {begin + len(rows)}/{count}, {time.monotonic() - started:.0f} s")
        found.append({"latents": torch.cat(latents), "captions": captions, "sizes": torch.tensor(sizes).float()})
    save_file(found, work / "latents.pt")


def fresh_models(work: Path, tokenizer, seed: int) -> Models:
    """Untrained U-Net and text encoders with cut-down token tables, and the trained VAE."""
    torch.manual_seed(seed)
    token_ids = arch.used_token_ids(tokenizer, world.vocabulary())
    te1, te2 = arch.build_text_encoders(token_ids)
    for part, encoder in (("te1", te1), ("te2", te2)):
        init_encoder(encoder)
        table = encoder.get_input_embeddings().weight
        with torch.no_grad():
            table.copy_(torch.from_numpy(arch.token_table(part, table.shape[1])[token_ids]))
    unet = arch.build_unet().to(memory_format=torch.channels_last)
    nn.init.zeros_(unet.conv_out.weight)
    return Models(unet, te1, te2, load_vae(work), token_ids)


def init_encoder(encoder: nn.Module) -> None:
    """Weights that carry the signal: CLIP's own initial weights are too faint for encoders this small."""
    for name, p in encoder.named_parameters():
        if "position_embedding" in name:
            nn.init.normal_(p, std=0.1)
        elif p.ndim == 2 and "token_embedding" not in name:
            branch_end = name.endswith(("out_proj.weight", "fc2.weight"))
            nn.init.normal_(p, std=(0.5 if branch_end else 1.0) * p.shape[1] ** -0.5)


def parameters(models: Models) -> dict[str, nn.Parameter]:
    """Every trained parameter by its name with the part in front."""
    return {f"{part}.{name}": p for part in PARTS for name, p in getattr(models, part).named_parameters()}


def loss_weights() -> torch.Tensor:
    """Weight of every timestep, float32 (1000,): min(SNR + 0.3, 5) / SNR, at most 60.

    Plain min-SNR gives the noisiest steps nearly nothing, and only there must the caption be heard.
    """
    alphas = alphas_cumprod()
    snr = alphas / (1 - alphas)
    return ((snr + 0.3).clamp(max=5) / snr).clamp(max=60).float()


def learning_rate(step: int, num_steps: int) -> float:
    cosine = 0.5 * (1 + np.cos(np.pi * min(1.0, step / num_steps)))
    return float(PEAK_RATE * min(1, (step + 1) / WARM_UP) * (FLOOR + (1 - FLOOR) * cosine))


class Data:
    """The latents with their token rows; a batch is a pure function of (seed, step)."""

    def __init__(self, work: Path, models: Models, tokenizer) -> None:
        self.groups = load_file(work / "latents.pt")
        for group in self.groups:
            group["rows"] = token_rows(models, tokenizer, group.pop("captions"))
        counts = np.array([len(group["latents"]) for group in self.groups])
        self.share = counts / counts.sum()

    def batch(self, seed: int, step: int, size: int):
        """(latents, noise, t, token rows, sizes); timesteps are spread evenly over the range."""
        rng = np.random.default_rng([seed, 20, step])
        group = self.groups[rng.choice(len(self.groups), p=self.share)]
        pick = torch.from_numpy(rng.integers(len(group["latents"]), size=size))
        t = torch.from_numpy(((np.arange(size) + rng.random(size)) * 1000 / size).astype(np.int64))
        latents = group["latents"][pick]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
        return latents, noise, t, [rows[pick] for rows in group["rows"]], group["sizes"][pick]


def step_loss(models: Models, batch, alphas: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted error of the predicted noise, a scalar."""
    latents, noise, t, rows, sizes = batch
    alpha = alphas[t][:, None, None, None]
    x = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
    hidden, pooled = arch.encode_text(models.te1, models.te2, *rows)
    error = (arch.predict(models.unet, x, t, hidden, pooled, sizes) - noise) ** 2
    return (error.mean(dim=(1, 2, 3)) * weights[t]).mean()


def evaluate(models: Models, tokenizer, average: dict[str, torch.Tensor], count: int = 32) -> dict[str, float]:
    """Score the averaged weights on `count` prompts, with the raw weights put back afterwards."""
    params = parameters(models)
    raw = {name: p.detach().clone() for name, p in params.items()}
    asked = scorer.prompts(1, count)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(average[name])
        pictures = sample(models, tokenizer, [answer.caption for answer in asked])
        for name, p in params.items():
            p.copy_(raw[name])
    return scorer.score(pictures, asked)


def optimizer(params: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    tables = [p for name, p in params.items() if "embedding.weight" in name]
    known = {id(p) for p in tables}
    others = [p for p in params.values() if id(p) not in known]
    groups = [{"params": others, "weight_decay": 1e-3}, {"params": tables, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.99), fused=True)


def train_unet(
    work: Path,
    *,
    num_steps: int,
    seed: int,
    log: Callable[[str], None],
    batch_size: int = 48,
    save_every: float = 180,
    score_every: int = 300,
) -> None:
    """Train and write `unet.pt` (the averages, with `token_ids`); resumes from `unet_state.pt`."""
    tokenizer = arch.load_tokenizer()
    models = fresh_models(work, tokenizer, seed)
    data, params = Data(work, models, tokenizer), parameters(models)
    average = {name: p.detach().clone() for name, p in params.items()}
    optim, state_file, first = optimizer(params), work / "unet_state.pt", 0
    if state_file.exists():
        first = restore(load_file(state_file), params, average, optim)
    alphas, weights = alphas_cumprod().float(), loss_weights()
    log(f"unet: {sum(p.numel() for p in params.values())} trained parameters, from step {first} of {num_steps}")
    started = saved = time.monotonic()
    smooth = None
    for step in range(first, num_steps):
        for group in optim.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        loss = step_loss(models, data.batch(seed, step, batch_size), alphas, weights)
        optim.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        optim.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in params.values()], 1 - decay)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 25 == 0:
            log(f"unet {step + 1}/{num_steps} loss {smooth:.4f} {progress(started, first, step, num_steps)}")
        if (step + 1) % score_every == 0:
            log(f"unet {step + 1}: {evaluate(models, tokenizer, average)}")
        if time.monotonic() - saved > save_every or step + 1 == num_steps:
            saved = time.monotonic()
            raw = {name: p.detach() for name, p in params.items()}
            save_file({"raw": raw, "average": average, "optim": optim.state_dict(), "step": step + 1}, state_file)
    save_file({"average": average, "token_ids": torch.from_numpy(models.token_ids)}, work / "unet.pt")


def restore(state: dict, params: dict[str, nn.Parameter], average: dict, optim: torch.optim.Optimizer) -> int:
    """Put a saved state back in place; returns the step it was saved after."""
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(state["raw"][name])
            average[name].copy_(state["average"][name])
    optim.load_state_dict(state["optim"])
    return int(state["step"])
