"""The algebra of low-rank files: singular values of products, ranks chosen from them, factors of a change.

Shape letters: O rows of a module's weight, I its columns (a convolution's kernel flattened: in * kh * kw), r rank,
K = min(O, I) singular values. A change is delta_OI = scale * up_Or @ down_rI. Everything is computed in the dtype of
the arguments, float32 where the callers of this suite do it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

DynamicMethod = Literal["sv_ratio", "sv_fro", "sv_cumulative"]
ZERO_MATRIX = 1e-6  # a largest singular value up to this is a module that was not trained
_OVERSAMPLING = 16  # extra columns of the randomised method (Halko, Martinsson, Tropp 2011 advise 5 to 10)


class Svd(NamedTuple):
    """A (possibly truncated) singular value decomposition u_Or @ diag(s_r) @ vh_rI, s falling."""

    u_Or: Tensor
    s_r: Tensor
    vh_rI: Tensor


class Factors(NamedTuple):
    """up_Or and down_rI whose product, times alpha / r, is a change."""

    up_Or: Tensor
    down_rI: Tensor


def svd_of_product(up_Or: Tensor, down_rI: Tensor) -> Svd:
    """The singular value decomposition of up_Or @ down_rI with min(r, O, I) values, without forming the product.

    up = Q1 R1 and down^T = Q2 R2 give up @ down = Q1 (R1 R2^T) Q2^T, so only an r x r matrix is decomposed.
    """
    q1, r1 = torch.linalg.qr(up_Or)
    q2, r2 = torch.linalg.qr(down_rI.T)
    u, s, vh = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    return Svd(q1 @ u, s, vh @ q2.T)


def svd_of_matrix(delta_OI: Tensor, rank: int, *, iterations: int | None = None) -> Svd:
    """The `rank` largest singular values of a matrix and their vectors.

    iterations: None computes all of them exactly (LAPACK); a number takes the randomised method with so many power
    iterations (Halko, Martinsson, Tropp 2011, algorithm 4.4), whose test matrix has a seed of its own.
    """
    if iterations is None or rank + _OVERSAMPLING >= min(delta_OI.shape):
        u, s, vh = torch.linalg.svd(delta_OI, full_matrices=False)
        return Svd(u[:, :rank], s[:rank], vh[:rank])
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(delta_OI.shape[1], rank + _OVERSAMPLING, generator=generator).to(delta_OI)
    q, _ = torch.linalg.qr(delta_OI @ test)
    for _ in range(iterations):
        q, _ = torch.linalg.qr(delta_OI.T @ q)
        q, _ = torch.linalg.qr(delta_OI @ q)
    u, s, vh = torch.linalg.svd(q.T @ delta_OI, full_matrices=False)
    return Svd(q @ u[:, :rank], s[:rank], vh[:rank])


def factors_of(svd: Svd, rank: int) -> Factors:
    """up = U S and down = V^T of the `rank` largest values: with alpha = rank the best change of that rank.

    A rank above the number of values is filled with directions orthogonal to the others in down and zeros in up, so
    that the change is the same. rank must not be above min(O, I).
    """
    kept = min(rank, len(svd.s_r))
    up, down = svd.u_Or[:, :kept] * svd.s_r[:kept], svd.vh_rI[:kept]
    if kept == rank:
        return Factors(up.contiguous(), down.contiguous())
    generator = torch.Generator().manual_seed(0)
    fill = torch.randn(rank - kept, down.shape[1], generator=generator).to(down)
    rows, _ = torch.linalg.qr(torch.cat([down, fill]).T)
    more = torch.zeros(up.shape[0], rank - kept, dtype=up.dtype, device=up.device)
    return Factors(torch.cat([up, more], 1), torch.cat([down, rows.T[kept:]]).contiguous())


def clamped(factors: Factors, quantile: float) -> Factors:
    """Both factors cut off at plus and minus the quantile (0..1) of all their values together; 1 changes nothing."""
    if quantile >= 1:
        return factors
    values = torch.cat([factors.up_Or.flatten(), factors.down_rI.flatten()])
    # kthvalue instead of torch.quantile, which refuses more than 16 million values; linear between neighbours.
    place = quantile * (len(values) - 1)
    low = values.kthvalue(math.floor(place) + 1).values
    high = values.kthvalue(math.ceil(place) + 1).values
    limit = float(low + (high - low) * (place - math.floor(place)))
    return Factors(factors.up_Or.clamp(-limit, limit), factors.down_rI.clamp(-limit, limit))


def dynamic_rank(s_r: Tensor, *, num_values: int, method: DynamicMethod, param: float, cap: int) -> int:
    """The rank that one of the three rules gives for falling singular values (lora_format.md section 9).

    sv_ratio: the values above s_1 / param. sv_cumulative: as many as make up the share param of their sum. sv_fro:
    as many as make up the share param of the Frobenius norm, whose square is the sum of squares. The count, held
    within 1 and num_values - 1, plus 1; at most cap. num_values is K, of which the trailing ones that s_r leaves out
    are 0. A matrix whose largest value is at most 1e-6 has rank 1.
    """
    if float(s_r[0]) <= ZERO_MATRIX:
        return 1
    if method == "sv_ratio":
        count = int((s_r > s_r[0] / param).sum())
    elif method == "sv_cumulative":
        count = _first_place(s_r, param) + 1
    else:
        count = _first_place(s_r**2, param**2) + 1
    return max(1, min(max(1, min(count, num_values - 1)) + 1, cap, num_values))


def _first_place(weights_r: Tensor, share: float) -> int:
    """Index of the first partial sum that is at least `share` of the whole; the number of weights if none is."""
    shares = torch.cumsum(weights_r.double(), 0) / weights_r.double().sum()
    return int(torch.searchsorted(shares, share))


@dataclass(frozen=True)
class Retained:
    """What a truncation keeps: shares (0..1) of the sum of singular values and of the Frobenius norm, and s_1 / s_r."""

    sum: float
    frobenius: float
    ratio: float

    @classmethod
    def of(cls, s_r: Tensor, rank: int) -> Retained:
        """What the first `rank` of all values keep; a zero matrix keeps everything."""
        values, kept = s_r.double(), s_r[:rank].double()
        if float(values[0]) <= 0:
            return cls(1.0, 1.0, 1.0)
        norms = float(kept.square().sum() / values.square().sum())
        last = float(kept[-1])
        ratio = float(values[0]) / last if last > 0 else math.inf
        return cls(float(kept.sum() / values.sum()), math.sqrt(norms), ratio)
