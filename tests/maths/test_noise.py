"""Noise and what may be added to it: closed forms, statistics, and a function of the generators alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from library.diffusion.noise import NoiseExtras, NoiseSettings, draw_extras, sample_noise, training_noise
from library.seeds import derive_seed

SHAPE = (4, 16, 24)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _generators(seed: int) -> Callable[[str], torch.Generator]:
    return lambda purpose: _generator(derive_seed(purpose, seed))


def _extras(settings: NoiseSettings, *, rows: int = 1, shape: tuple[int, int, int] = SHAPE) -> NoiseExtras:
    return NoiseExtras.cat([draw_extras(settings, _generators(row), shape) for row in range(rows)])


def _noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, *SHAPE, generator=_generator(seed))


def test_noise_depends_on_the_generator_and_not_on_global_state():
    torch.manual_seed(1)
    first = sample_noise(_generator(5), (4, 8, 8))
    torch.manual_seed(2)
    assert torch.equal(first, sample_noise(_generator(5), (4, 8, 8)))
    assert not torch.equal(first, sample_noise(_generator(6), (4, 8, 8)))


def test_noise_is_standard_normal_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        noise = sample_noise(_generator(7), (4, 64, 64))
        extras = _extras(NoiseSettings(offset=0.1, pyramid_iterations=3, perturbation=0.1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert noise.dtype == torch.float32 and noise.shape == (4, 64, 64)
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.02
    parts = (extras.offset_BC, extras.offset_strength_B, extras.pyramid_BChw, extras.perturbation_BChw)
    assert [part.dtype for part in parts] == [torch.float32] * 4


def test_nothing_is_added_by_default():
    noise = _noise(2)
    target, given = training_noise(noise, _extras(NoiseSettings(), rows=2), torch.zeros_like(noise), adaptive_scale=3.0)
    assert target is noise and given is noise


def test_the_parts_of_a_sample_do_not_depend_on_each_other():
    """Each has a generator of its own, so switching one on moves no other."""
    every = NoiseSettings(offset=0.1, pyramid_iterations=4, perturbation=0.2)
    together = _extras(every)
    assert torch.equal(_extras(NoiseSettings(offset=0.1)).offset_BC, together.offset_BC)
    assert torch.equal(_extras(NoiseSettings(pyramid_iterations=4)).pyramid_BChw, together.pyramid_BChw)
    assert torch.equal(_extras(NoiseSettings(perturbation=0.2)).perturbation_BChw, together.perturbation_BChw)


def test_an_offset_moves_every_channel_of_every_sample_by_its_own_constant():
    noise = _noise(3)
    extras = _extras(NoiseSettings(offset=0.25), rows=3)
    target, given = training_noise(noise, extras, torch.zeros_like(noise))
    moved = target - noise
    torch.testing.assert_close(moved, (0.25 * extras.offset_BC)[:, :, None, None].expand_as(noise), rtol=0, atol=1e-6)
    assert len(set(extras.offset_BC.flatten().tolist())) == 12
    assert given is target, "the offset belongs to the target"


def test_offsets_are_standard_normal_and_random_strengths_uniform():
    extras = _extras(NoiseSettings(offset=0.4, offset_is_random=True), rows=1500, shape=(4, 1, 1))
    assert abs(float(extras.offset_BC.mean())) < 0.06 and abs(float(extras.offset_BC.std()) - 1) < 0.04
    strength = extras.offset_strength_B
    assert 0 <= float(strength.min()) < 0.01 and 0.39 < strength.max() < 0.4
    assert abs(float(strength.mean()) - 0.2) < 0.01
    fixed = _extras(NoiseSettings(offset=0.4), rows=2).offset_strength_B
    assert torch.equal(fixed, torch.full((2,), 0.4))


@pytest.mark.parametrize("scale", [0.5, -0.05, -10.0])
def test_the_adaptive_part_follows_the_mean_of_each_channel_and_never_turns_the_offset(scale):
    noise, latents = _noise(2), _noise(2, seed=1) + torch.tensor([3.0, -2.0, 0.1, 0.0])[:, None, None]
    extras = _extras(NoiseSettings(offset=0.1), rows=2)
    target, _ = training_noise(noise, extras, latents, adaptive_scale=scale)
    for row in range(2):
        for channel in range(4):
            strength = max(0.0, 0.1 + scale * abs(float(latents[row, channel].mean())))
            expected = noise[row, channel] + strength * extras.offset_BC[row, channel]
            torch.testing.assert_close(target[row, channel], expected, rtol=0, atol=1e-5)


def test_a_pyramid_is_the_sum_of_its_levels():
    settings = NoiseSettings(pyramid_iterations=3, pyramid_discount=0.5)
    found = _extras(settings).pyramid_BChw
    source, expected = _generators(0)("multires noise"), torch.zeros(1, *SHAPE)
    sizes = []
    for level in range(3):
        ratio = 2 + 2 * torch.rand((), generator=source, dtype=torch.float64).item()
        h, w = (max(1, int(side / ratio**level)) for side in SHAPE[1:])
        sizes.append((h, w))
        coarse = torch.randn(1, 4, h, w, generator=source)
        expected += torch.nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear") * 0.5**level
    assert sizes[0] == SHAPE[1:] and sizes[0] > sizes[1] > sizes[2]
    torch.testing.assert_close(found, expected)


def test_a_pyramid_ends_with_a_side_of_one_cell():
    few = _extras(NoiseSettings(pyramid_iterations=5, pyramid_discount=0.9)).pyramid_BChw
    many = _extras(NoiseSettings(pyramid_iterations=50, pyramid_discount=0.9)).pyramid_BChw
    assert torch.equal(few, many), "16 cells are used up after at most 5 levels of 1, 1/2, 1/4 ..."
    assert not torch.equal(few, _extras(NoiseSettings(pyramid_iterations=2, pyramid_discount=0.9)).pyramid_BChw)


def test_with_a_pyramid_each_sample_has_unit_deviation_whatever_its_neighbours():
    noise = _noise(2)
    settings = NoiseSettings(offset=5.0, pyramid_iterations=6, pyramid_discount=0.9)
    extras = _extras(settings, rows=2)
    target, _ = training_noise(noise, extras, torch.zeros_like(noise))
    torch.testing.assert_close(target.std(dim=(1, 2, 3)), torch.ones(2))
    offset = (extras.offset_BC * 5.0)[:, :, None, None]
    raw = noise + offset + extras.pyramid_BChw
    torch.testing.assert_close(target[1], raw[1] / raw[1].std())
    alone, _ = training_noise(noise[1:], _extras_of_row(settings, 1), torch.zeros_like(noise[1:]))
    assert torch.equal(alone[0], target[1])


def _extras_of_row(settings: NoiseSettings, row: int) -> NoiseExtras:
    return draw_extras(settings, _generators(row), SHAPE)


def test_a_perturbation_reaches_the_input_and_not_the_target():
    """As `input_perturbation` of diffusers' script: new_noise = noise + p * randn, while the target stays the noise."""
    noise = _noise(2)
    extras = _extras(NoiseSettings(perturbation=0.1), rows=2)
    target, given = training_noise(noise, extras, torch.zeros_like(noise))
    assert target is noise
    normal = torch.stack([torch.randn(*SHAPE, generator=_generators(row)("noise perturbation")) for row in range(2)])
    torch.testing.assert_close(given, noise + 0.1 * normal, rtol=0, atol=1e-6)


def test_a_random_perturbation_has_its_own_strength_in_each_sample():
    fixed = _extras(NoiseSettings(perturbation=0.1), rows=6).perturbation_BChw
    drawn = _extras(NoiseSettings(perturbation=0.1, perturbation_is_random=True), rows=6).perturbation_BChw
    ratios = (drawn / fixed).flatten(1)
    assert torch.allclose(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-4)
    assert len({round(float(ratio), 4) for ratio in ratios[:, 0]}) == 6
    assert ratios.min() >= 0 and ratios.max() < 1


def test_extras_move_and_join_whole():
    extras = _extras(NoiseSettings(offset=0.1, perturbation=0.1), rows=2).to("meta")
    assert extras.offset_BC.is_meta and extras.perturbation_BChw.is_meta and extras.pyramid_BChw is None
    assert extras.offset_BC.shape == (2, 4) and extras.offset_strength_B.shape == (2,)
