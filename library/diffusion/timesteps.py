"""Which timestep a sample is trained at."""

from __future__ import annotations

import torch


def sample_timestep(
    generator: torch.Generator,
    *,
    min_timestep: int | None = None,
    max_timestep: int | None = None,
    num_steps: int = 1000,
) -> int:
    """Draw one timestep uniformly from [min_timestep, max_timestep); None means 0 and num_steps.

    min >= max is not empty but means "always max", as in sd-scripts; max == num_steps then gives the last timestep,
    because there is none after it. Exactly one number is drawn in either case, so that other draws from the same
    generator do not move. Source: spec conditioning.md §6.
    """
    low = 0 if min_timestep is None else min_timestep
    high = num_steps if max_timestep is None else max_timestep
    assert min(low, high) >= 0 and high <= num_steps, f"timesteps {low}..{high} outside 0..{num_steps}"
    draw = int(torch.randint(low, max(high, low + 1), (1,), generator=generator, device=generator.device))
    return draw if low < high else min(high, num_steps - 1)
