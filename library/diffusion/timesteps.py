"""Which timestep a sample is trained at: a number in [0, 1) and a table that turns it into a timestep.

The table holds the shape of the distribution (uniform, logit-normal, biased, cut to a range). The number comes from the
sample's own generator or, spread evenly over the samples of a step, from the sample's place in the epoch.

Shape letters: N schedule steps.
"""

from __future__ import annotations

import functools
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

NUM_STEPS = 1000
_BITS = 53  # of a float64 number


@dataclass(frozen=True)
class TimestepTable:
    """A distribution over timesteps: `cumulative_N[t]` is the chance of a timestep up to and including t."""

    cumulative_N: tuple[float, ...]

    @classmethod
    def uniform(cls, low: int | None = None, high: int | None = None, *, num_steps: int = NUM_STEPS) -> TimestepTable:
        """All of [low, high) alike; None means 0 and num_steps."""
        return cls.of([1.0] * num_steps, low, high)

    @classmethod
    def of(cls, weights_N: Sequence[float], low: int | None = None, high: int | None = None) -> TimestepTable:
        """Timesteps of [low, high) in proportion to `weights_N` (>= 0); None means 0 and N.

        low >= high is not empty but means "always high", as in sd-scripts; high == N then gives the last timestep.
        Raises ValueError when no weight is left in the range. Source: spec conditioning.md section 6.
        """
        num_steps = len(weights_N)
        low, high = 0 if low is None else low, num_steps if high is None else high
        assert min(low, high) >= 0 and max(low, high) <= num_steps, f"timesteps {low}..{high} outside 0..{num_steps}"
        if low >= high:
            low = min(high, num_steps - 1)
            high, weights_N = low + 1, [1.0] * num_steps
        masses_N = [weight if low <= t < high else 0.0 for t, weight in enumerate(weights_N)]
        total = math.fsum(masses_N)
        if not total > 0:
            raise ValueError(f"no timestep of {low}..{high - 1} has a chance")
        last = max(t for t, mass in enumerate(masses_N) if mass > 0)
        sums_N = [value / total for value in accumulate(masses_N)]
        return cls(tuple(1.0 if t >= last else min(value, 1.0) for t, value in enumerate(sums_N)))

    def at(self, u: float) -> int:
        """The timestep whose share of [0, 1) holds `u`; larger u are later (noisier) timesteps."""
        assert 0 <= u < 1, u
        return bisect_right(self.cumulative_N, u)


def logit_normal_weights(mean: float, std: float, *, num_steps: int = NUM_STEPS) -> list[float]:
    """The chance of each timestep when its place in [0, 1] is the sigmoid of a normal number, (N,).

    Timestep t stands for [t/N, (t+1)/N). A positive `mean` favours late (noisy) timesteps, as in the paper; the
    scripts of diffusers count the other way round. Esser et al. 2024 (Stable Diffusion 3), section 3.1.
    """
    assert std > 0

    def below(place: float) -> float:
        if place <= 0 or place >= 1:
            return float(place >= 1)
        return 0.5 * math.erfc(-(math.log(place / (1 - place)) - mean) / (std * math.sqrt(2)))

    edges = [below(t / num_steps) for t in range(num_steps + 1)]
    return [after - before for before, after in pairwise(edges)]


def biased_steps(
    strategy: str, *, portion: float = 0.25, begin: int = 0, end: int = NUM_STEPS, num_steps: int = NUM_STEPS
) -> range:
    """The timesteps that a bias favours: the first or last `portion` of the schedule, or [begin, end).

    `earlier` are low timesteps, with little noise. Source: `generate_timestep_weights` of diffusers' SDXL script.
    """
    count = int(portion * num_steps)
    if strategy == "earlier":
        return range(count)
    if strategy == "later":
        return range(num_steps - count, num_steps)
    if strategy == "range":
        return range(begin, end)
    assert strategy == "none", strategy
    return range(0)


def biased(weights_N: Sequence[float], favoured: range, multiplier: float) -> list[float]:
    """`weights_N` with those of the favoured timesteps multiplied (> 0; below 1 they become rarer)."""
    return [weight * multiplier if t in favoured else weight for t, weight in enumerate(weights_N)]


def sobol_number(position: int, *, scramble: int) -> float:
    """Number `position` (from 0) of the one-dimensional Sobol sequence in base 2, scrambled by the bits of `scramble`.

    Of every 2**k numbers from a multiple of 2**k on, each of the 2**k equal parts of [0, 1) holds exactly one. Any
    other stretch is almost as even. The scramble is a digital shift, which keeps this and makes each number uniform.
    Sobol 1967; Matousek 1998.
    """
    assert position >= 0
    position %= 1 << _BITS
    mirrored = int(f"{position:0{_BITS}b}"[::-1], 2)
    return (mirrored ^ (scramble % (1 << _BITS))) * 2.0**-_BITS


def stratified_number(index: int, count: int, *, jitter: float, seed: int) -> float:
    """The number in [0, 1) of sample `index` of `count`: each of the `count` equal parts of [0, 1) has one sample.

    Which part it is depends on `seed`, where in it on `jitter` in [0, 1).
    """
    assert 0 <= index < count and 0 <= jitter < 1
    return min((_shuffled(count, seed)[index] + jitter) / count, math.nextafter(1.0, 0.0))


@functools.lru_cache(maxsize=16)
def _shuffled(count: int, seed: int) -> tuple[int, ...]:
    parts = list(range(count))
    random.Random(seed).shuffle(parts)
    return tuple(parts)
