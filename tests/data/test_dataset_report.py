"""The dataset report shows what training sees, finds what is wrong, and needs no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.data.dataset import build_train_data
from library.data.inspection import KINDS, InspectionSettings, inspect
from library.data.report_files import report_text, write_report_json
from library.data.stores import CachedLatents
from library.data.text_caching import TextCacheOptions, build_text
from tests.data.fakes import fake_text_encoder
from tests.data.specs import dataset, picture, subset, write_folder, write_picture

ROOT = Path(__file__).resolve().parents[2]
RANDOM = {
    "flip_aug": True,
    "random_crop": True,
    "shuffle_caption": True,
    "caption_dropout_rate": 0.2,
    "caption_tag_dropout_rate": 0.3,
    "caption_dropout_every_n_epochs": 3,
    "num_repeats": 3,
}
WARM_UP = {"token_warmup_min": 1, "token_warmup_step": 0.5, "num_repeats": 2}


def letters(captions) -> list[int]:
    """A tokenizer with a token for every letter."""
    return [len(caption) for caption in captions]


def look(*specs, **settings):
    return inspect(list(specs), InspectionSettings(**({"count_tokens": letters, "seed": 7} | settings)))


class CentralLatents:
    """A store of latents that are all zero."""

    in_memory, is_filling, moments = True, False, False

    def __init__(self, table):
        self.table = table

    def awaits(self, row):
        return False

    def get(self, row, *, flipped):
        bucket = self.table.placement(row).bucket
        return CachedLatents(torch.zeros(4, bucket.h // 8, bucket.w // 8))

    def has(self, rows):
        return torch.ones(len(rows), dtype=torch.bool).numpy()


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("changes", [{}, RANDOM, WARM_UP], ids=["plain", "random", "warm-up"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_the_report_equals_the_batches_of_the_epoch(tmp_path, epoch, changes, is_cached):
    specs = [
        dataset(subset(write_folder(tmp_path / "one"), **changes)),
        dataset(subset(write_folder(tmp_path / "two"), caption_prefix="p"), batch_size=3, enable_bucket=False),
    ]
    data = build_train_data(specs, seed=7, accumulation=2)
    data.set_length(data.steps_before(3))
    if is_cached:
        data.attach_latents(CentralLatents(data.table))
    trained = samples_of(data, epoch)
    found = look(*specs, epoch=epoch, accumulation=2, max_train_epochs=3, is_cached=is_cached)
    shown = {image.record.key: (image.caption, image.size_ids, image.bucket) for image in found.images}
    assert shown == trained and len(shown) == 14
    assert [image.record.key for image in found.images] == [record.key for record in data.records]


def samples_of(data, epoch):
    """Caption, size ids and bucket of the first visit of every image in an epoch, by its key."""
    return {
        batch.keys[row].record: (batch.captions[row], tuple(batch.sizes_B6[row].tolist()), batch.bucket)
        for group in data.epoch(epoch)
        for batch in group.micro_batches
        for row in range(batch.num_real)
        if batch.keys[row].repeat == 0
    }


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_captions_are_the_cached_wordings_that_training_draws(tmp_path, epoch):
    specs = [
        dataset(subset(write_folder(tmp_path / "one"), **RANDOM)),
        dataset(subset(write_folder(tmp_path / "two"), caption_prefix="p")),
    ]
    data = build_train_data(specs, seed=7)
    store, _ = build_text(data.all_images, fake_text_encoder, options=TextCacheOptions("t", 1, num_variants=3))
    data.attach_text(store)
    shown = {image.record.key: image.caption for image in look(*specs, epoch=epoch, num_variants=3).images}
    assert shown == {key: caption for key, (caption, *_) in samples_of(data, epoch).items()} and len(shown) == 14
    plain = {image.record.key: image.caption for image in look(*specs, epoch=epoch).images}
    assert epoch == 2 or shown != plain


def test_held_out_images_are_counted_and_not_shown(tmp_path):
    spec = dataset(subset(write_folder(tmp_path), **RANDOM), validation_split=0.4)
    data = build_train_data([spec], seed=7)
    found = look(spec)
    assert {image.record.key for image in found.images} == samples_of(data, 0).keys()
    assert (len(found.images), found.summary.held_out) == (4, 3)
    assert "3 images are held out for validation" in report_text(found)


def test_the_size_ids_are_those_of_sd_scripts_when_training_uses_them(tmp_path):
    spec = dataset(subset(write_folder(tmp_path / "one")))
    (real, legacy) = (look(spec, legacy_crop=legacy).images for legacy in (False, True))
    batches = build_train_data([spec], seed=7, legacy_crop=True).epoch(0)
    trained = {
        key.record: tuple(ids)
        for group in batches
        for batch in group.micro_batches
        for key, ids in zip(batch.keys, batch.sizes_B6.tolist(), strict=True)
    }
    assert {image.record.key: image.size_ids for image in legacy} == trained
    assert [image.size_ids for image in real] != [image.size_ids for image in legacy]


@pytest.fixture(scope="module")
def troubled(tmp_path_factory) -> Path:
    """Pictures with one problem of each kind; the names say which."""
    folder = tmp_path_factory.mktemp("data") / "3_träume & <b>"
    for number in range(3):
        write_picture(folder / f"good{number}.png", 64, 64, caption=f"a, b{number}", seed=number)
    write_picture(folder / "no_caption.png", 64, 64, seed=10)
    write_picture(folder / "empty_caption.png", 64, 64, caption=" \n", seed=11)
    write_picture(folder / "cut_caption.png", 64, 64, caption="word " * 40, seed=12)
    write_picture(folder / "too_small.png", 20, 20, caption="small", seed=13)
    write_picture(folder / "cropped.png", 400, 64, caption="wide", seed=14)
    write_picture(folder / "near_duplicate.jpg", 64, 64, caption="again", seed=0)
    (folder / "zduplicate.png").write_bytes((folder / "good1.png").read_bytes())
    (folder / "zduplicate.txt").write_text("the same")
    whole = write_picture(folder / "unreadable.jpg", 64, 64, caption="torn", seed=15).read_bytes()
    (folder / "unreadable.jpg").write_bytes(whole[: len(whole) * 9 // 10])
    (folder / "unreadable_at_once.png").write_bytes(b"")
    return folder


def test_every_problem_is_found_with_its_path(troubled):
    found = look(dataset(subset(troubled, num_repeats=3), bucket_max_upscale=1.55))
    problems = {(problem.kind, Path(problem.path).stem) for problem in found.problems}
    assert problems == {
        ("unreadable", "unreadable"),
        ("unreadable", "unreadable_at_once"),
        ("no_caption", "no_caption"),
        ("empty_caption", "empty_caption"),
        ("cut_caption", "cut_caption"),
        ("over_limit", "too_small"),
        ("too_small", "too_small"),
        ("cropped", "cropped"),
        ("duplicate", "zduplicate"),
        ("near_duplicate", "near_duplicate"),
    }
    assert {kind for kind, _ in problems} | {"unreadable_mask"} == set(KINDS)
    others = {problem.kind: Path(problem.other).name for problem in found.problems if problem.other}
    assert others == {"duplicate": "good1.png", "near_duplicate": "good0.png"}
    text = report_text(found)
    for kind, name in problems:
        assert KINDS[kind] in text and f"{name}." in text
    assert "64x64" in text and "11 images, 33 samples an epoch" in text


def test_a_data_set_without_problems_says_so(tmp_path):
    found = look(dataset(subset(write_folder(tmp_path, sizes=[(64, 64), (96, 40)]))))
    assert found.problems == [] and "Problems: none" in report_text(found)


def test_a_file_of_two_data_sets_is_no_duplicate_of_itself(tmp_path):
    folder = write_folder(tmp_path, sizes=[(64, 64)] * 2)
    found = look(dataset(subset(folder)), dataset(subset(folder)))
    assert len(found.images) == 4 and found.problems == []


def test_captions_count_by_their_longest_wording_even_when_they_are_dropped(tmp_path):
    write_picture(tmp_path / "a.png", 64, 64, caption="x" * 80)
    found = look(dataset(subset(tmp_path, caption_dropout_rate=1.0)))
    (image,) = found.images
    assert (image.caption, image.tokens, image.longest) == ("", 0, 80)
    assert found.counts == {"cut_caption": 1}
    assert "1 are dropped in this epoch" in report_text(found)


def test_an_image_that_was_replaced_meanwhile_is_unreadable(tmp_path, monkeypatch):
    write_folder(tmp_path, sizes=[(64, 64)] * 2)
    monkeypatch.setattr("library.data.inspection.assemble", _replacing(tmp_path / "p1.png"))
    (problem,) = look(dataset(subset(tmp_path))).problems
    assert problem.kind == "unreadable" and problem.path.endswith("p1.png") and "96x64" in problem.what


def _replacing(path):
    from library.data.assemble import assemble

    def scan(specs, **options):
        result = assemble(specs, **options)
        write_picture(path, 96, 64)
        return result

    return scan


def test_thumbnails_go_to_images_with_problems_first(troubled):
    spec = dataset(subset(troubled))
    for limit in (0, 3, 7, 50):
        found = look(spec, thumbnails=limit)
        pictured = {i for i, one in enumerate(found.looks) if one.thumbnail}
        readable = {i for i, one in enumerate(found.looks) if one.error is None}
        named = {problem.path for problem in found.problems} | {problem.other for problem in found.problems}
        troubles = {i for i in readable if found.images[i].record.path in named}
        assert len(pictured) == min(limit, len(readable))
        assert pictured <= troubles or pictured >= troubles


def test_json_has_the_fields_that_programs_rely_on(troubled, tmp_path):
    found = look(dataset(subset(troubled, flip_aug=True)), epoch=4)
    write_report_json(found, tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (report["epoch"], report["seed"]) == (4, 7)
    by_name = {Path(image["path"]).name: image for image in report["images"]}
    assert len(by_name) == 11
    wide = by_name["cropped.png"]
    assert wide["bucket"] == [128, 32] and wide["resized"] == [200, 32] and wide["crop"] == [36, 0]
    assert wide["size_ids"] == [64, 400, 0, 36, 32, 128]
    assert (wide["caption"], wide["tokens"], wide["cropped_share"]) == ("wide", 4, 0.36)
    assert {image["flipped"] for image in report["images"]} == {True, False}
    assert by_name["near_duplicate.jpg"]["near_duplicate_of"] == by_name["good0.png"]["path"]
    assert [problem["kind"] for problem in report["problems"]].count("unreadable") == 2
    assert all(Path(problem["path"]).name and problem["what"] for problem in report["problems"])


# Runs a script in an interpreter that has neither torch nor transformers.
RUNNER = """
import runpy, sys
for name in ("torch", "transformers", "diffusers", "accelerate"):
    sys.modules[name] = None
script, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
sys.path.insert(0, {root!r})
runpy.run_path(script, run_name="__main__")
"""


def start(script: str, *arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUNNER.format(root=str(ROOT)), str(ROOT / script), *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


SMALL = ("--resolution=64", "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128")


def test_the_tool_needs_no_torch(troubled, tmp_path):
    page, listing = tmp_path / "new" / "r.html", tmp_path / "new" / "r.json"
    # a file with the name's bytes in no known encoding, where the file system can hold one
    odd = os.fsencode(troubled) + b"/odd\xff.png"
    try:
        with open(odd, "wb") as file:
            file.write((troubled / "good2.png").read_bytes())
    except OSError:
        odd = None
    before = {path: path.read_bytes() for path in troubled.iterdir() if path.suffix}
    done = start(
        "tools/dataset_report.py",
        f"--train_data_dir={troubled.parent}",
        "--caption_extension=.txt",
        "--bucket_reso_steps=32",
        f"--json={listing}",
        f"--html={page}",
        *SMALL,
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(listing.read_text(encoding="utf-8"))
    image = next(image for image in report["images"] if image["path"].endswith("cut_caption.png"))
    assert image["tokens"] == 40 and image["repeats"] == 3
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "3_tr\\xe4ume & <b>: " in done.stdout and f"written: {page}" in done.stdout
    assert {path: path.read_bytes() for path in troubled.iterdir() if path.suffix} == before
    if odd:
        assert any(image["path"].endswith("odd\udcff.png") for image in report["images"])
        os.unlink(odd)


def test_settings_that_are_wrong_are_refused_together(tmp_path):
    wrong = (f"--train_data_dir={tmp_path / 'none'}", "--epoch=-1", f"--html={tmp_path}")
    done = start("tools/dataset_report.py", *wrong, *SMALL)
    assert done.returncode == 2 and done.stdout == ""
    assert all(name in done.stderr for name in ("3 problems", "epoch", "train_data_dir", "is a folder"))


def test_the_trainer_shows_its_data_and_ends_before_a_model_is_loaded(troubled, tmp_path):
    output = tmp_path / "out"
    done = start(
        "sdxl_train_network.py",
        "--pretrained_model_name_or_path=tiny",
        f"--train_data_dir={troubled.parent}",
        "--caption_extension=.txt",
        "--bucket_reso_steps=32",
        "--network_module=networks.lora",
        f"--output_dir={output}",
        "--debug_dataset",
        *SMALL,
    )
    assert done.returncode == 0, done.stderr
    assert "11 images, 33 samples an epoch" in done.stdout and "captions that lose text" not in done.stdout
    assert [path.name for path in output.iterdir()] == ["dataset_report.html"]


def test_other_ranks_leave_the_report_to_the_first(troubled, tmp_path):
    done = start(
        "sdxl_train_network.py",
        "--pretrained_model_name_or_path=tiny",
        f"--train_data_dir={troubled.parent}",
        "--network_module=networks.lora",
        f"--output_dir={tmp_path / 'out'}",
        "--debug_dataset",
        "--bucket_reso_steps=32",
        *SMALL,
        RANK="1",
        WORLD_SIZE="2",
    )
    assert (done.returncode, done.stdout) == (0, "") and not (tmp_path / "out").exists()


def test_pictures_of_the_fixture_differ():
    """The look-alike tests rest on it."""
    assert (picture(64, 64, seed=0) != picture(64, 64, seed=1)).mean() > 0.9


def test_masks_are_those_that_training_reads(tmp_path):
    folder, masks = tmp_path / "images", tmp_path / "masks"
    write_folder(folder, sizes=[(64, 64)] * 2)
    write_folder(masks, sizes=[(64, 64)] * 2)
    spec = dataset(subset(folder, mask_dir=str(masks)))
    found = look(spec, thumbnails=2)
    assert [Path(image.record.mask).parent for image in found.images] == [masks] * 2
    assert all(one.mask for one in found.looks) and found.problems == []
    assert "2 images have a loss mask" in report_text(found)
    write_picture(masks / "p1.png", 96, 64)
    (problem,) = look(spec).problems
    assert problem.kind == "unreadable" and "mask" in problem.what and problem.path.endswith("p1.png")
