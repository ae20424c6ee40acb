"""Train the tiny VAE and fold a whitening into it, so that SDXL's scaling factor fits."""

import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tools.tiny import arch, world
from tools.tiny.files import load_file, progress, save_file

# (crop in pixels, batch, share of the steps, cost of a step): small crops first, they are cheap.
PHASES = ((32, 48, 0.475, 1.0), (64, 24, 0.436, 2.0), (128, 8, 0.089, 2.67))
PEAK_RATE, WARM_UP, EMA_DECAY = 2e-3, 60, 0.995


def synthetic_picture(rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """A picture outside the world, uint8: noise of many scales, rings, checkers, free polygons."""
    kind = rng.integers(5)
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    if kind <= 1:  # a sum of octaves looks like photos to a VAE
        picture = np.zeros((size, size, 3), np.float32)
        for octave in range(1, 7):
            noise = rng.standard_normal((2**octave + 1, 2**octave + 1, 3)).astype(np.float32)
            picture += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC) * 0.62**octave
        picture = first + picture * rng.uniform(40, 130)
    elif kind == 2:
        phase = np.hypot(x - rng.uniform(0, size), y - rng.uniform(0, size)) / rng.uniform(2, 14)
        share = (0.5 + 0.5 * np.sin(phase))[..., None]
        picture = first * share + second * (1 - share)
    elif kind == 3:
        cell = rng.uniform(4, 24)
        share = (((x // cell) + (y // cell)) % 2)[..., None]
        picture = first * share + second * (1 - share)
    else:
        picture = np.broadcast_to(first, (size, size, 3)).copy()
        for _ in range(rng.integers(3, 12)):
            corners = (rng.uniform(0, size, 2) + rng.uniform(-50, 50, (rng.integers(3, 7), 2))).astype(np.int32)
            cv2.fillPoly(picture, [corners], rng.uniform(0, 255, 3).tolist(), lineType=cv2.LINE_AA)
    return np.clip(picture, 0, 255).astype(np.uint8)


def picture_pool(seed: int, count: int) -> np.ndarray:
    """Training pictures, uint8 (count, 128, 128, 3): world, figures in free colours, and synthetic ones."""
    rng = np.random.default_rng([seed, 1])
    pool = np.empty((count, 128, 128, 3), np.uint8)
    for row in range(count):
        kind = rng.random()
        if kind < 0.50:
            pool[row] = world.draw(rng)[0]
        elif kind < 0.62:  # any colour, so that new concepts can be encoded
            scene = world.sample_scene(rng)
            ground = world.background_picture(rng.uniform(0, 255, 3), scene.texture, 128, 128)
            pool[row] = np.clip(world.compose(world.figure_mask(scene), rng.uniform(0, 255, 3), ground), 0, 255)
        else:
            pool[row] = synthetic_picture(rng)
    return pool


def smart_init(vae: nn.Module, generator: torch.Generator) -> None:
    """Start as an almost linear path: residual branches at zero, channel changes orthogonal.

    With the usual initialisation a VAE of this size stalls.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith(("conv_in", "downsamplers.0.conv", "upsamplers.0.conv", "conv_shortcut")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
            middle = module.kernel_size[0] // 2
            tap = torch.empty(module.weight.shape[:2])
            nn.init.orthogonal_(tap, generator=generator)
            with torch.no_grad():
                module.weight[:, :, middle, middle] = tap


def reconstruction_loss(out: torch.Tensor, target: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor):
    """L1 + L2/2 + L1 of the gradients + L1 of 8x8 means + a whisper of KL; returns (loss, L1)."""
    l1 = (out - target).abs().mean()
    gradient = sum((out.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (2, 3))
    means = (F.avg_pool2d(out, 8) - F.avg_pool2d(target, 8)).abs().mean()
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return l1 + 0.5 * F.mse_loss(out, target) + 0.4 * gradient + 0.5 * means + 1e-4 * divergence, l1


def schedule(num_steps: int) -> list[tuple[int, int, float]]:
    """(crop, batch, learning rate) of every step; the cosine runs over cost, not over steps."""
    bounds = np.cumsum([share for _, _, share, _ in PHASES]) * num_steps
    phases = [PHASES[min(int(np.searchsorted(bounds, step + 0.5)), len(PHASES) - 1)] for step in range(num_steps)]
    done = np.cumsum([cost for *_, cost in phases])
    rows = []
    for step, (crop, batch, _, _) in enumerate(phases):
        cosine = 0.5 * (1 + np.cos(np.pi * done[step] / done[-1]))
        rows.append((crop, batch, float(PEAK_RATE * min(1, (step + 1) / WARM_UP) * (0.02 + 0.98 * cosine))))
    return rows


def random_crops(pool: np.ndarray, rng: np.random.Generator, crop: int, batch: int) -> torch.Tensor:
    """float32 (batch, 3, crop, crop) in [-1, 1]."""
    rows = rng.integers(len(pool), size=batch)
    tops, lefts = rng.integers(0, pool.shape[1] - crop + 1, (2, batch))
    pixels = np.stack([pool[r, t : t + crop, s : s + crop] for r, t, s in zip(rows, tops, lefts, strict=True)])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def whiten(vae: nn.Module, pictures: np.ndarray, scale: float = arch.SCALING_FACTOR) -> None:
    """Fold a whitening per channel into the VAE: latents x scale get mean 0 and deviation 1.

    quant_conv makes the mean and the log-variance, post_quant_conv undoes the change.
    """
    means = torch.cat([encode(vae, pictures[i : i + 32], scale=1.0) for i in range(0, len(pictures), 32)])
    mu, k = means.mean(dim=(0, 2, 3)), 1 / (means.std(dim=(0, 2, 3)) * scale)
    channels = len(k)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] *= k[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mu) * k
    quant.bias[channels:] += 2 * k.log()
    post.bias += post.weight[:, :, 0, 0] @ mu
    post.weight /= k[None, :, None, None]


@torch.no_grad()
def encode(vae: nn.Module, pictures: np.ndarray, scale: float = arch.SCALING_FACTOR) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> latents (B, 4, H/8, W/8) float32: the mean of the posterior, scaled."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean * scale


@torch.no_grad()
def decode(vae: nn.Module, latents: torch.Tensor, scale: float = arch.SCALING_FACTOR) -> np.ndarray:
    """Scaled latents -> uint8 (B, H, W, 3)."""
    x = vae.decode(latents / scale).sample
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def psnr(vae: nn.Module, pictures: np.ndarray) -> float:
    """Mean PSNR in dB of encoding and decoding uint8 pictures."""
    out = np.concatenate([decode(vae, encode(vae, pictures[i : i + 32])) for i in range(0, len(pictures), 32)])
    error = ((out.astype(np.float64) - pictures) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-3))).mean())


def train_vae(work: Path, *, num_steps: int, seed: int, log: Callable[[str], None], save_every: float = 180) -> None:
    """Train and write `vae.pt` (whitened EMA weights); resumes from `vae_state.pt`."""
    torch.manual_seed(seed)
    vae = arch.build_vae().to(memory_format=torch.channels_last)
    smart_init(vae, torch.Generator().manual_seed(seed))
    average = {name: value.detach().clone() for name, value in vae.state_dict().items()}
    optim = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    first, state_file = 0, work / "vae_state.pt"
    if state_file.exists():
        state = load_file(state_file)
        vae.load_state_dict(state["model"])
        optim.load_state_dict(state["optim"])
        average, first = state["average"], state["step"]
    pool = picture_pool(seed, 5000)
    rows = schedule(num_steps)
    log(f"vae: {sum(p.numel() for p in vae.parameters())} parameters, {len(pool)} pictures, from step {first}")
    started = saved = time.monotonic()
    for step in range(first, num_steps):
        crop, batch, rate = rows[step]
        optim.param_groups[0]["lr"] = rate
        loss, l1 = vae_step(vae, random_crops(pool, np.random.default_rng([seed, 2, step]), crop, batch), step, seed)
        optim.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optim.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), list(vae.state_dict().values()), 1 - decay)
        if step % 25 == 0 or step == num_steps - 1:
            log(
                f"vae {step + 1}/{num_steps} crop {crop} l1 {l1.item():.4f} {progress(started, first, step, num_steps)}"
            )
        if time.monotonic() - saved > save_every:
            saved = time.monotonic()
            parts = {"model": vae.state_dict(), "optim": optim.state_dict(), "average": average}
            save_file({**parts, "step": step + 1}, state_file)
    vae.load_state_dict(average)
    vae.eval()
    rng = np.random.default_rng([seed, 3])
    fresh = np.stack([world.draw(rng)[0] for _ in range(256)])
    whiten(vae, fresh)
    latents = encode(vae, fresh[:64])
    log(f"vae: latents mean {latents.mean():.3f} std {latents.std():.3f}, psnr {psnr(vae, fresh[:64]):.2f} dB")
    save_file(vae.state_dict(), work / "vae.pt")


def vae_step(vae: nn.Module, x: torch.Tensor, step: int, seed: int):
    """Loss and L1 of a batch; the posterior is sampled with a generator of the step."""
    posterior = vae.encode(x).latent_dist
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    noise = torch.randn(posterior.mean.shape, generator=generator)
    out = vae.decode(posterior.mean + posterior.std * noise).sample
    return reconstruction_loss(out, x, posterior.mean, posterior.logvar)
