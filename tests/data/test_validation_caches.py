"""Batches of held-out images come from every kind of cache, and hold what they would hold without one."""

import pytest
import torch

from library.data.cache_places import CachePlace
from library.data.dataset import build_train_data
from library.data.latent_caching import build_latents
from library.data.text_caching import TextCacheOptions, build_text
from library.sizes import Size
from tests.data.fakes import Counting, fake_vae
from tests.data.ranks import Ranks
from tests.data.specs import dataset, subset, write_folder
from tests.data.test_latent_filling import Run, options_of
from tests.data.test_latent_moments import fake_moments
from tests.data.variants import digests, variants

NUM_HELD = 3


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


def specs_of(folder, **changes):
    spec = {"validation_split": 0.4, "validation_seed": 8, "other_resolutions": (Size(96, 96), Size(128, 128))}
    return [dataset(subset(folder, **({"flip_aug": True, "num_repeats": 2} | changes)), **spec)]


def fresh(specs):
    return build_train_data(specs, seed=5)


def batches(data, epoch=0):
    return [batch for group in data.epoch(epoch) for batch in group.micro_batches]


def num_entries(data):
    """Latents to be had: an image may have one placement at two resolutions."""
    table, rows = data.table, data.table.rows
    return len(set(zip(table.image_of[rows].tolist(), table.placement_of[rows].tolist(), strict=True)))


def whole_pass(specs, *, encode, **options):
    data = fresh(specs)
    data.attach_latents(build_latents(data.all_images, Counting(encode), options=options_of(**options))[0])
    return data


def store_options(store, tmp_path):
    place = {"place": CachePlace("packed", tmp_path / "cache")} if store == "packed" else {}
    return {"to_disk": store != "memory"} | place


def assert_like_uncached(data, specs, *, encode, tolerance):
    """Batches of the held-out images of `data`: those without a cache, encoded."""
    expected = batches(fresh(specs).validation)
    found = batches(data.validation)
    assert sum(batch.num_real for batch in found) == NUM_HELD
    for one, two in zip(found, expected, strict=True):
        assert (one.keys, one.captions, one.num_real) == (two.keys, two.captions, two.num_real)
        assert one.pixels_B3HW is None and one.awaits == () and not one.failures
        rows = one.moments_B8hw if encode is fake_moments else one.latents_B4hw
        assert torch.allclose(rows.float(), encode(two.pixels_B3HW, None)[0], atol=tolerance)
        assert torch.equal(one.sizes_B6, two.sizes_B6)
        assert (one.mask_B1hw is None) == (two.mask_B1hw is None)
        assert one.mask_B1hw is None or torch.allclose(one.mask_B1hw.float(), two.mask_B1hw, atol=1e-2)


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("store", ["memory", "npz", "packed"])
@pytest.mark.parametrize(("encode", "changes"), [(fake_vae, {}), (fake_vae, {"alpha_mask": True}), (fake_moments, {})])
def test_latents_of_held_out_images_are_those_without_a_cache(folder, tmp_path, in_background, store, encode, changes):
    specs = specs_of(folder, **changes)
    options = store_options(store, tmp_path) | {"moments": encode is fake_moments}
    like = {"encode": encode, "tolerance": 1e-2 if store == "packed" else 1e-6}
    if not in_background:
        assert_like_uncached(whole_pass(specs, encode=encode, **options), specs, **like)
        return
    run = Run(specs, encode=encode, **options)
    held = num_entries(run.data.validation)
    assert held > NUM_HELD and run.encode.images == held, "at once, at all resolutions, without mirror images"
    assert not run.filler.is_complete
    assert_like_uncached(run.data, specs, **like)
    batches(run.data)
    assert run.filler.is_complete and run.left == 1
    assert run.encode.images == held + 2 * num_entries(run.data)
    assert_like_uncached(run.data, specs, **like)
    run.data.close()
    if store != "memory":
        again = Run(specs, encode=encode, **options)
        assert again.filler.is_complete and again.encode.loads == 0
        assert_like_uncached(again.data, specs, **like)
        again.data.close()


def test_workers_read_held_out_images_while_the_cache_fills(folder):
    specs = specs_of(folder)
    run = Run(specs, encode=fake_vae, workers=2)
    assert_like_uncached(run.data, specs, encode=fake_vae, tolerance=1e-6)
    run.data.close()


def break_held_out(folder, data):
    """Damage one of the held-out pictures; its path."""
    path = folder / data.validation.records[0].path.rpartition("/")[2]
    path.write_bytes(path.read_bytes()[:200])
    return str(path)


def test_a_held_out_image_that_cannot_be_read_is_left_out_from_the_start(folder):
    specs = specs_of(folder)
    broken = break_held_out(folder, fresh(specs))
    run = Run(specs)
    assert len(run.data.validation.records) == NUM_HELD - 1
    assert broken in [skipped.path for skipped in run.data.summary().skipped]
    assert sum(batch.num_real for batch in batches(run.data.validation)) == NUM_HELD - 1
    batches(run.data)
    assert run.filler.is_complete and run.left == 1
    run.data.close()


@pytest.mark.parametrize("to_disk", [False, True])
def test_ranks_share_the_held_out_images(folder, to_disk, monkeypatch):
    specs = specs_of(folder)
    broken = break_held_out(folder, fresh(specs))
    alone = Run(specs, encode=fake_vae, to_disk=False)
    expected = {
        key: row
        for batch in batches(alone.data.validation)
        for key, row in zip(batch.keys, batch.latents_B4hw, strict=True)
    }
    alone.data.close()

    def work(rank):
        run = Run(specs, encode=fake_vae, rank=rank, world=2, to_disk=to_disk)
        at_start, found = run.encode.images, batches(run.data.validation)
        batches(run.data)
        run.data.close()
        return run, at_start, found

    met = {}
    runs = Ranks(2, monkeypatch).run(work)
    for run, at_start, found in runs:
        assert at_start > 0 and run.filler.is_complete and run.left == 1
        assert broken not in [record.path for record in run.data.validation.records]
        for batch in found:
            met |= dict(list(zip(batch.keys, batch.latents_B4hw, strict=True))[: batch.num_real])
    assert sum(at_start for _, at_start, _ in runs) == num_entries(alone.data.validation)
    assert met.keys() == expected.keys() and all(torch.equal(met[key], expected[key]) for key in met)


@pytest.mark.parametrize("store", ["memory", "npz", "packed"])
@pytest.mark.parametrize("num_variants", [1, 3])
def test_captions_of_held_out_images_are_encoded_in_all_their_wordings(folder, tmp_path, store, num_variants):
    """Of a held-out image only wildcards are drawn; its captions are neither shuffled nor dropped."""
    changes = {"shuffle_caption": True, "caption_dropout_rate": 0.5} if num_variants > 1 else {}
    for number in range(7) if num_variants > 1 else ():
        (folder / f"p{number}.txt").write_text("a {red|green|blue|grey} {1|2|3}, b, c, d")
    specs = specs_of(folder, enable_wildcard=num_variants > 1, **changes)
    plain, data = fresh(specs), fresh(specs)
    options = TextCacheOptions("te", 1, num_variants=num_variants, **store_options(store, tmp_path))
    data.attach_text(build_text(data.all_images, digests, options=options)[0])
    seen = {}
    for epoch in range(6):
        for one, two in zip(batches(data.validation, epoch), batches(plain.validation, epoch), strict=True):
            assert one.keys == two.keys and one.tokens is None and "" not in one.captions
            expected = digests(one.captions)
            assert torch.allclose(one.text.hidden_BTD.float(), expected.hidden_BTD, rtol=1e-3)
            assert torch.allclose(one.text.pooled_BP.float(), expected.pooled_BP, rtol=1e-3)
            for key, caption in zip(one.keys, one.captions, strict=True):
                seen.setdefault(key.record, set()).add(caption)
            assert num_variants > 1 or one.captions == two.captions
    for record in data.validation.records:
        wordings = variants(record, num_variants) if num_variants > 1 else [record.caption]
        assert seen[record.key] <= set(wordings)
    assert (max(map(len, seen.values())) > 1) == (num_variants > 1)
    again = [batch.captions for batch in batches(fresh(specs).validation)]
    assert again == [batch.captions for batch in batches(plain.validation)], "epoch 0 is the same in every run"
