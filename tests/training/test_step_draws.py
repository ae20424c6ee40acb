"""The random numbers of a step: which settings decide them, and what they must not depend on."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from library.config.cli import make_config
from library.data.dataset import build_train_data
from library.data.types import Place, SampleKey
from library.diffusion.noise import NoiseSettings
from library.errors import UserError
from library.training.draws import Draws, timestep_table
from tests.data.specs import dataset, subset

SHAPE = (4, 2, 2)


def _config(tmp_path, **options):
    (tmp_path / "1_thing").mkdir(exist_ok=True)
    return make_config(
        "sdxl_train_network",
        pretrained_model_name_or_path="tiny",
        train_data_dir=str(tmp_path),
        output_dir=str(tmp_path),
        resolution=64,
        network_module="networks.lora",
        **options,
    )


def _timesteps(draws: Draws, count: int = 4000) -> torch.Tensor:
    keys = [SampleKey(f"{n}.png", 0) for n in range(count)]
    return torch.tensor([draws._timestep(key, 0, None) for key in keys])


def test_timesteps_are_uniform_over_the_whole_schedule_by_default(tmp_path):
    t = _timesteps(Draws.of(_config(tmp_path), 1), 8000)
    counts = torch.histc(t.float(), bins=10, min=0, max=1000)
    assert counts.min() > 680 and counts.max() < 920  # 800 expected, standard deviation 27
    assert t.min() < 5 and t.max() > 994


def test_range_bias_and_distribution_act_together(tmp_path):
    cfg = _config(
        tmp_path,
        min_timestep=200,
        max_timestep=800,
        timestep_sampling="logit_normal",
        logit_mean=0.4,
        logit_std=0.8,
        timestep_bias_strategy="range",
        timestep_bias_begin=700,
        timestep_bias_end=900,
        timestep_bias_multiplier=3.0,
    )
    t = _timesteps(Draws.of(cfg, 1))
    assert t.min() >= 200 and t.max() < 800
    table = timestep_table(cfg).cumulative_N
    assert float((t < 700).float().mean()) == pytest.approx(table[699], abs=0.03)
    plain = torch.sigmoid(torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.4) * 1000
    inside = plain[(plain >= 200) & (plain < 800)]
    late = 3 * (inside >= 700).float().mean()
    assert 1 - table[699] == pytest.approx(float(late / (late + (inside < 700).float().mean())), abs=0.006)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, NoiseSettings()),
        ({"noise_offset": 0.1}, NoiseSettings(offset=0.1)),
        ({"noise_offset": 0.1, "noise_offset_random_strength": True}, NoiseSettings(0.1, True)),
        (
            {"multires_noise_iterations": 6, "multires_noise_discount": 0.5},
            NoiseSettings(pyramid_iterations=6, pyramid_discount=0.5),
        ),
        ({"ip_noise_gamma": 0.1}, NoiseSettings(perturbation=0.1)),
        ({"input_perturbation": 0.1}, NoiseSettings(perturbation=0.1)),
        (
            {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True},
            NoiseSettings(perturbation=0.1, perturbation_is_random=True),
        ),
    ],
)
def test_settings_reach_the_noise(tmp_path, options, expected):
    assert Draws.of(_config(tmp_path, **options), 1) == Draws(1, noise=expected)


def test_a_distribution_without_mass_in_the_range_is_an_error_with_advice(tmp_path):
    cfg = _config(
        tmp_path, timestep_sampling="logit_normal", logit_mean=20.0, logit_std=0.1, max_timestep=100, min_timestep=0
    )
    with pytest.raises(UserError, match=r"0\.\.99") as caught:
        timestep_table(cfg)
    assert "--logit_mean 20.0" in caught.value.problems[0].where


def test_narrowing_the_timesteps_moves_no_noise(tmp_path):
    key = [SampleKey("a.png", 1)]
    wide = Draws.of(_config(tmp_path), 1).make(key, 2, latent_shape=SHAPE, posterior=True)
    narrow = Draws.of(_config(tmp_path, max_timestep=10, noise_offset=0.1), 1).make(
        key, 2, latent_shape=SHAPE, posterior=True
    )
    assert torch.equal(wide.noise_BChw, narrow.noise_BChw) and torch.equal(wide.posterior_BChw, narrow.posterior_BChw)
    assert int(narrow.t_B) == int(wide.t_B) // 100, "the same number picks from the narrower table"


@pytest.mark.parametrize("sequence", ["stratified", "sobol"])
def test_the_samples_of_a_step_are_spread_evenly(sequence):
    draws = Draws(5, sequence=sequence)
    for epoch, step in ((0, 0), (0, 3), (2, 3)):
        places = [Place(step * 8 + index, index, 8) for index in range(8)]
        keys = [SampleKey(f"{step}-{index}", 0) for index in range(8)]
        drawn = draws.make(keys, epoch, latent_shape=SHAPE, posterior=False, places=places)
        assert sorted((drawn.t_B // 125).tolist()) == list(range(8))
    with pytest.raises(AssertionError, match="places"):
        draws.make(keys, 0, latent_shape=SHAPE, posterior=False)


@pytest.mark.parametrize("sequence", ["stratified", "sobol"])
def test_even_timesteps_differ_between_epochs_steps_and_seeds(sequence):
    def drawn(seed: int, epoch: int, step: int) -> list[int]:
        places = [Place(step * 8 + index, index, 8) for index in range(8)]
        keys = [SampleKey(f"{index}", 0) for index in range(8)]
        make = Draws(seed, sequence=sequence).make
        return make(keys, epoch, latent_shape=SHAPE, posterior=False, places=places).t_B.tolist()

    base = drawn(0, 0, 0)
    assert base == drawn(0, 0, 0)
    assert len({tuple(found) for found in (base, drawn(1, 0, 0), drawn(0, 1, 0), drawn(0, 0, 1))}) == 4


@pytest.fixture
def folder(tmp_path):
    for number in range(7):
        size = (64, 64) if number < 4 else (96, 64)
        Image.new("RGB", size, (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def _data(folder, *, batch_size, **settings):
    spec = dataset(
        subset(folder, num_repeats=2),
        batch_size=batch_size,
        bucket_reso_steps=32,
        min_bucket_reso=32,
        max_bucket_reso=128,
    )
    return build_train_data([spec], seed=7, **settings)


def _places(data, epoch=0, start=0):
    """Per step: key -> place of every real row."""
    return [
        {batch.keys[row]: batch.places[row] for batch in group.micro_batches for row in range(batch.num_real)}
        for group in data.epoch(epoch, start)
    ]


def _joined(*parts):
    return [{key: place for step in steps for key, place in step.items()} for steps in zip(*parts, strict=True)]


@pytest.mark.parametrize("epoch", range(4))  # the short micro-batches stand elsewhere in each
def test_places_count_the_samples_of_the_epoch_and_of_each_step(folder, epoch):
    steps = _places(_data(folder, batch_size=3, accumulation=2), epoch)
    position = 0
    for step in steps:
        places = sorted(step.values())
        assert [place.in_step for place in places] == list(range(len(step)))
        assert [place.position for place in places] == list(range(position, position + len(step)))
        assert {place.step_size for place in places} == {len(step)}
        position += len(step)
    assert position == 14


@pytest.mark.parametrize("accumulation", [1, 2])
def test_places_are_those_of_one_process_with_a_larger_batch(folder, accumulation):
    whole = _places(_data(folder, batch_size=4, accumulation=accumulation))
    ranks = [_places(_data(folder, batch_size=2, accumulation=accumulation, world=2, rank=rank)) for rank in range(2)]
    assert _joined(*ranks) == whole
    assert _places(_data(folder, batch_size=4, accumulation=accumulation, num_workers=1)) == whole
    for start in range(1, len(whole)):
        assert _places(_data(folder, batch_size=4, accumulation=accumulation), start=start) == whole[start:]


def test_accumulation_changes_no_position(folder):
    def positions(accumulation):
        steps = _places(_data(folder, batch_size=2, accumulation=accumulation))
        return {key: place.position for step in steps for key, place in step.items()}

    assert positions(1) == positions(3)


def test_padding_has_the_place_of_the_sample_it_copies(folder):
    for rank in range(3):
        for group in _data(folder, batch_size=1, world=3, rank=rank).epoch(0):
            for batch in group.micro_batches:
                assert len(batch.places) == len(batch.keys)
                assert all(batch.places[row] == batch.places[0] for row in range(batch.num_real, len(batch)))
