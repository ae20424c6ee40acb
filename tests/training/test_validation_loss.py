"""The validation loss: fixed noise, a fixed grid of timesteps, and the same numbers however it is computed."""

import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.config.evaluation import ValidationOptions
from library.data.comparison import training_subset
from library.data.dataset import build_train_data
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.diffusion.weighting import Weighting
from library.models import checkpoint
from library.models.families import sdxl
from library.seeds import derive_seed
from library.training.evaluation import eval_mode, kept_random_state
from library.training.hooks import Event, View
from library.training.metrics import Meters
from library.training.objective import Objective
from library.training.state import Progress
from library.training.step import StepOutput, TrainStep
from library.training.validation import HELD_OUT, TRAINED, Band, Means, Validation, timestep_grid
from library.training.validation_hook import ValidationHook
from tests.data.fakes import Counting, fake_vae
from tests.data.specs import dataset, subset, write_folder, write_picture

# --- the grid -----------------------------------------------------------------------------------------------------


@given(low=st.integers(0, 998), width=st.integers(1, 1000), count=st.integers(1, 1000))
def test_bands_divide_the_range_and_hold_their_middles(low, width, count):
    high = min(low + width, 1000)
    grid = timestep_grid(low, high, count)
    assert len(grid) == min(count, high - low)
    assert [t for band in grid for t in range(band.low, band.high + 1)] == list(range(low, high))
    lengths = {band.high - band.low + 1 for band in grid}
    assert max(lengths) - min(lengths) <= 1
    assert all(abs(2 * band.middle - band.low - band.high) <= 1 for band in grid)


def test_the_usual_grid():
    assert timestep_grid(0, 1000, 5) == [
        Band(0, 199, 99), Band(200, 399, 299), Band(400, 599, 499), Band(600, 799, 699), Band(800, 999, 899),
    ]  # fmt: skip


# --- the part of the training images ------------------------------------------------------------------------------


def _data(folder, *, batch_size=2, world=1, rank=0, seed=5, **changes):
    spec = dataset(
        subset(folder, num_repeats=3, flip_aug=True, caption_dropout_rate=1.0, **changes),
        batch_size=batch_size,
        validation_split=0.4,
        validation_seed=8,
    )
    return build_train_data([spec], seed=seed, world=world, rank=rank)


def _keys(data):
    return sorted(
        key.record for group in data.epoch(0) for batch in group.micro_batches for key in batch.keys[: batch.num_real]
    )


def test_the_training_part_is_as_large_and_disjoint_and_served_as_it_is(tmp_path):
    data = _data(write_folder(tmp_path / "images"))
    before = data.table.repeats.copy()
    part = training_subset(data, len(data.validation.table.images), seed=8)
    held, compared, trained = _keys(data.validation), _keys(part), {record.key for record in data.records}
    assert len(compared) == len(held) == 3 and set(compared) < trained and not set(compared) & set(held)
    captions = [caption for group in part.epoch(0) for batch in group.micro_batches for caption in batch.captions]
    assert all(caption.startswith("a, b") for caption in captions), "dropout would have emptied them"
    assert (data.table.repeats == before).all() and len(_keys(data)) == 3 * len(trained)
    assert part.validation is None
    assert _keys(training_subset(data, 3, seed=8)) == compared
    assert {tuple(_keys(training_subset(data, 1, seed=seed))) for seed in range(20)} > {(compared[0],)}
    assert _keys(training_subset(data, 100, seed=8)) == sorted(trained)


def test_the_training_part_holds_no_regularisation_images_and_reads_the_caches(tmp_path):
    write_folder(tmp_path / "images")
    write_picture(tmp_path / "reg" / "r.png", 64, 64, caption="reg")
    spec = dataset(subset(tmp_path / "images"), subset(tmp_path / "reg", is_reg=True), validation_split=0.4)
    data = build_train_data([spec], seed=5)
    part = training_subset(data, 100, seed=1)
    assert len(_keys(part)) == 4 and not any("r.png" in key for key in _keys(part))
    options = LatentCacheOptions(vae_id="vae", to_disk=False, batch_size=2)
    data.attach_latents(build_latents(data.all_images, Counting(fake_vae), options=options)[0])
    part.share_caches(data)
    batches = [batch for group in part.epoch(0) for batch in group.micro_batches]
    assert all(batch.latents_B4hw is not None and batch.pixels_B3HW is None for batch in batches)


# --- measuring ----------------------------------------------------------------------------------------------------


class _Step(torch.nn.Module):
    """A step whose loss tells its image, its noise and its timestep."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def encoded(self, batch, draw):
        means = batch.pixels_B3HW.mean((1, 2, 3)).view(-1, 1, 1, 1)
        shape = (len(batch.keys), 4, batch.bucket.h // 8, batch.bucket.w // 8)
        return SimpleNamespace(**{**vars(batch), "latents_B4hw": means.expand(shape) + 0 * draw.posterior_BChw})

    def forward(self, batch, draw, *, plain):
        assert plain
        self.seen += list(zip((key.record for key in batch.keys), draw.t_B.tolist(), strict=True))
        loss_B = (batch.latents_B4hw + draw.noise_BChw).pow(2).mean((1, 2, 3)) + draw.t_B / 1000
        return StepOutput(loss_B.mean(), loss_B, torch.zeros(()))


def _accelerator(**changes):
    values = {"device": torch.device("cpu"), "num_processes": 1, "autocast": nullcontext, "is_main_process": True}
    return SimpleNamespace(**(values | changes))


def _validation(data, step=None, *, count=4, limit=None, accelerator=None):
    subset_ = training_subset(data, len(data.validation.table.images), seed=8)
    grid = timestep_grid(0, 1000, count)
    sets = {HELD_OUT: data.validation, TRAINED: subset_}
    return Validation(sets, data, step or _Step(), accelerator or _accelerator(), grid, 8, limit)


def _measure(validation):
    return validation.measure(nullcontext, lambda: None)


def test_every_image_is_measured_once_at_every_timestep_and_always_the_same(tmp_path):
    data = _data(write_folder(tmp_path / "images"))
    step = _Step()
    validation = _validation(data, step)
    found = _measure(validation)
    keys = _keys(data.validation) + _keys(validation.sets[TRAINED])
    real = {(key, band.middle) for key in keys for band in validation.grid}
    assert set(step.seen) == real
    assert found[HELD_OUT].images == found[TRAINED].images == 3
    assert found[HELD_OUT].mean == pytest.approx(sum(found[HELD_OUT].bands) / 4)
    assert _measure(validation) == found
    other = _validation(_data(tmp_path / "images", seed=6))
    assert _measure(other) == found, "validation_seed alone decides, not the seed of the run"


def test_the_loss_depends_neither_on_the_batch_size_nor_on_the_number_of_ranks(tmp_path):
    folder = write_folder(tmp_path / "images")
    expected = _measure(_validation(_data(folder)))
    one_by_one = _measure(_validation(_data(folder, batch_size=1)))
    parts = []
    for rank in (0, 1):
        accelerator = _accelerator(num_processes=2, reduce=lambda sums, reduction: parts.append(sums) or sums)
        _measure(_validation(_data(folder, world=2, rank=rank), accelerator=accelerator))
    for number, name in enumerate((HELD_OUT, TRAINED)):
        assert one_by_one[name].bands == pytest.approx(expected[name].bands, rel=1e-6)
        *totals, count = (parts[number] + parts[number + 2]).tolist()
        assert count == 3 and [total / 3 for total in totals] == pytest.approx(expected[name].bands, rel=1e-6)


def test_the_limit_counts_batches_of_each_set(tmp_path):
    data = _data(write_folder(tmp_path / "images"), batch_size=1)
    validation = _validation(data, limit=2)
    found = _measure(validation)
    assert (found[HELD_OUT].images, found[TRAINED].images, validation.num_batches) == (2, 2, 4)


def test_an_image_without_finite_latents_does_not_count(tmp_path):
    class Broken(_Step):
        def encoded(self, batch, draw):
            found = super().encoded(batch, draw)
            bad = torch.tensor([key.record == broken for key in batch.keys]).view(-1, 1, 1, 1)
            found.latents_B4hw = torch.where(bad, torch.nan, found.latents_B4hw)
            return found

    data = _data(write_folder(tmp_path / "images"))
    broken = _keys(data.validation)[0]
    found = _measure(_validation(data, Broken()))[HELD_OUT]
    assert found.images == 2 and all(np.isfinite(found.bands))


def test_it_is_the_mean_squared_error_of_the_prediction(tmp_path):
    bundle = checkpoint.load_bundle("tiny")
    write_picture(tmp_path / "images" / "a.png", 64, 64, caption="a red circle", seed=1)
    write_picture(tmp_path / "images" / "b.png", 64, 64, caption="a blue square", seed=2)
    spec = dataset(subset(tmp_path / "images"), validation_split=0.5, validation_seed=8)
    data = build_train_data([spec], seed=5, tokenize=lambda texts: sdxl.tokenize(bundle.tokenizer, texts))
    trainable = SimpleNamespace(trains=frozenset(), forward_scope=lambda batch: nullcontext())
    mse = TrainStep(
        bundle,
        trainable,
        torch.nn.Identity(),
        objective=Objective(weighting=Weighting(min_snr_gamma=0.1), dream=1.0),  # of which nothing counts
        with_text=True,
    )
    validation = _validation(data, mse.eval(), count=2)
    with torch.no_grad():
        found = _measure(validation)[HELD_OUT]
        (group,) = data.validation.epoch(0)
        (batch,) = group.micro_batches
        key = batch.keys[0].record

        def noise(purpose, timestep):
            seed = derive_seed(8, purpose, key, timestep)
            return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))[None]

        latents = sdxl.encode_image(bundle.vae, batch.pixels_B3HW, noise("validation posterior", 0)).float() * 0.13025
        text = sdxl.encode_text(bundle.text_encoder_1, bundle.text_encoder_2, batch.tokens)
        for band, measured in zip(validation.grid, found.bands, strict=True):
            alpha = bundle.schedule.alphas_cumprod_N[band.middle].item()
            drawn = noise("validation", band.middle)
            noisy = alpha**0.5 * latents + (1 - alpha) ** 0.5 * drawn
            predicted = sdxl.predict(bundle.unet, noisy, torch.tensor([band.middle]), text, batch.sizes_B6)
            assert measured == pytest.approx((predicted - drawn).pow(2).mean().item(), rel=1e-4)


# --- when ---------------------------------------------------------------------------------------------------------


@dataclass
class _Fake:
    accelerator: SimpleNamespace = field(default_factory=_accelerator)
    grid: tuple = (Band(0, 999, 499),)
    num_batches: int = 1

    def measure(self, scope, tick):
        return {HELD_OUT: Means(0.5, (0.5,), 2), TRAINED: Means(0.25, (0.25,), 2)}


def _moments(total=10, per_epoch=4, *, start=0, stop_at=None, **options):
    """The steps after which a run validates."""
    records = []
    view = View(Progress(), total, -(-total // per_epoch), Meters())
    # A state that was saved after the last step of an epoch, which is still to end.
    view.progress.epoch, view.progress.step_in_epoch = divmod(start - 1, per_epoch) if start else (0, -1)
    view.progress.step_in_epoch += 1
    view.progress.global_step = start
    hook = ValidationHook(_Fake(), ValidationOptions(**options), nullcontext, lambda view, r: records.append(r))
    hook(Event.START, view)
    if view.progress.step_in_epoch == per_epoch:
        view.progress.next_epoch()
        hook(Event.EPOCH, view)
    while view.progress.global_step < total and not view.stop:
        view.progress.advance(1)
        view.stop = view.progress.global_step == stop_at
        hook(Event.STEP, view)
        if view.progress.step_in_epoch == per_epoch:
            view.progress.next_epoch()
            hook(Event.EPOCH, view)
    hook(Event.END, view)
    return [record["step"] for record in records]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [4, 8, 10]),
        ({"total": 8}, [4, 8]),
        ({"validate_every_n_epochs": 2}, [8, 10]),
        ({"validate_every_n_steps": 3}, [3, 4, 6, 8, 9, 10]),
        ({"validate_every_n_steps": 2, "validate_every_n_epochs": 2}, [2, 4, 6, 8, 10]),
        ({"validate_at_first": True}, [0, 4, 8, 10]),
        ({"stop_at": 6}, [4]),
        ({"start": 10}, []),
        ({"start": 4, "validate_at_first": True}, [4, 8, 10]),
        ({"start": 4, "validate_every_n_steps": 4}, [8, 10]),
        ({"start": 5, "validate_every_n_steps": 5}, [8, 10]),
    ],
)
def test_the_moments_of_a_run(options, steps):
    assert _moments(**options) == steps


def test_what_is_noted_and_said(caplog):
    records = []
    view = View(Progress(epoch=1, step_in_epoch=2, global_step=6), 10, 3, Meters())
    hook = ValidationHook(
        _Fake(), ValidationOptions(validate_every_n_steps=6), nullcontext, lambda v, r: records.append(r)
    )
    with caplog.at_level("INFO"):
        hook(Event.STEP, view)
    assert records == [
        {
            "step": 6,
            "epoch": 2,
            "loss/validation/held_out": 0.5,
            "loss/validation/held_out/t000-999": 0.5,
            "loss/validation/train_subset": 0.25,
            "loss/validation/train_subset/t000-999": 0.25,
            "loss/validation/gap": 0.25,
        }
    ]
    assert "validation loss at step 6: 0.5000 on 2 held out, 0.2500 on 2 training images, gap +0.2500" in caplog.text


# --- the state in which it is done --------------------------------------------------------------------------------


def test_modes_and_random_generators_are_put_back_also_after_an_error():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()), torch.nn.Linear(1, 1))
    module.train()
    module[1].eval()
    modes = [part.training for part in module.modules()]

    def state():
        return random.random(), np.random.random(), torch.rand(1).item()

    with kept_random_state():
        expected = state()
    with pytest.raises(ZeroDivisionError), kept_random_state(), eval_mode([module, None, module[1]]):
        state()
        assert not any(part.training for part in module.modules())
        raise ZeroDivisionError
    assert [part.training for part in module.modules()] == modes
    assert state() == expected
