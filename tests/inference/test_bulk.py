"""Runs with many pictures: written down, stopped and gone on with, shared out among processes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import sdxl_gen_img
from library.config.cli import make_config
from library.errors import UserError
from library.inference import launch, run
from library.inference.album import Album
from library.inference.highres import first_stage
from library.inference.picture_log import NAME, PictureLog
from library.inference.ranks import Share, share_of
from library.inference.request import GenRequest, HighresFix
from library.inference.saver import MOST_WAITING, Saver
from library.inference.texts import Conditioning, TextForm
from tests.ranks import two_ranks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and NumPy 2

LINES = "a {red|blue} circle --f round\na star --d 5,6 --w 64 --h 96\na cross --n dark --f round.webp --s 1\n" * 2


def argv_of(folder: Path, prompts: Path, *more: str) -> list[str]:
    argv = f"--ckpt tiny --from_file {prompts} --outdir {folder} --W 64 --H 64 --steps 2 --images_per_prompt 2 --seed 3"
    return [*argv.split(), "--batch_size", "2", "--sequential_file_name", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / NAME).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(LINES)
    return path


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory) -> Path:
    """The folder of a run of 12 pictures that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert sdxl_gen_img.main(argv_of(folder, prompts)) == 0
    return folder


@pytest.fixture
def stopped(prompts, tmp_path, monkeypatch) -> Path:
    """The folder of the same run, stopped after seven pictures and while the line of the seventh was written."""
    original, drawn = launch._drawn, []

    def fails(stage, batch, *args):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(batch)
        return original(stage, batch, *args)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "_drawn", fails)
        assert sdxl_gen_img.main(argv_of(tmp_path / "out", prompts)) == 130
    log = tmp_path / "out" / NAME
    assert len(entries(tmp_path / "out")) == 8
    log.write_bytes(log.read_bytes()[:-100])
    return tmp_path / "out"


def test_every_picture_has_a_line_with_all_that_made_it(whole):
    lines = entries(whole)
    assert [line["number"] for line in lines] == list(range(1, 13))
    assert [line["file"] for line in lines[:6]] == ["round.png", "round_001.png", "im_000003.png", "im_000004.png",
                                                    "round.webp", "round_001.webp"]  # fmt: skip
    assert {line["file"] for line in lines} | {NAME} == set(contents(whole))
    star = lines[2]
    assert (star["width"], star["height"], star["seed"], star["steps"], star["model"]) == (64, 96, 5, 2, "tiny")
    assert (star["prompt"], star["sampler"], star["networks"], star["vae"]) == ("a star", "ddim", [], None)
    assert lines[4]["negative"] == "dark" and lines[0]["raw"].startswith("a ") and "|" not in lines[0]["prompt"]
    for line in lines:
        assert line["bytes"] == (whole / line["file"]).stat().st_size
    with Image.open(whole / "round.png") as picture:
        assert picture.text["parameters"].startswith(lines[0]["prompt"] + "\nSteps: 2, Sampler: DDIM")


def test_a_stopped_run_goes_on_to_the_same_folder(whole, stopped, prompts, monkeypatch, caplog):
    size = (stopped / "round_001.png").stat().st_size
    (stopped / "round_001.png").write_bytes(b"x" * (size - 1))  # cut short by something else
    kept = (stopped / "im_000003.png").stat().st_mtime_ns
    batches = []
    original = launch._drawn
    monkeypatch.setattr(launch, "_drawn", lambda stage, batch, *a: batches.append(batch) or original(stage, batch, *a))
    caplog.set_level("INFO")
    assert sdxl_gen_img.main(argv_of(stopped, prompts, "--resume_bulk")) == 0
    assert "6 of 12 pictures are there already" in caplog.text and "half a line" in caplog.text
    assert [len(batch) for batch in batches] == [2] * 4  # the first, the one that was cut, and the two that are new
    assert contents(stopped) == contents(whole)
    assert (stopped / "im_000003.png").stat().st_mtime_ns == kept
    batches.clear()
    assert sdxl_gen_img.main(argv_of(stopped, prompts, "--resume_bulk")) == 0
    assert not batches and contents(stopped) == contents(whole)


def test_other_options_and_other_prompts_are_drawn_again(stopped, prompts, tmp_path, monkeypatch):
    """Only the two first pictures are still asked for, and with another quality none is what it would be."""
    monkeypatch.setattr(launch, "_drawn", lambda *a, **k: pytest.fail("drawn"))
    fewer = tmp_path / "fewer.txt"
    fewer.write_text(LINES.splitlines()[0])
    assert sdxl_gen_img.main(argv_of(stopped, prompts, "--resume_bulk", "--from_file", str(fewer))) == 0
    for other in (
        ["--seed", "4"],
        ["--image_quality", "50"],
        ["--no_half_vae"],
        ["--scale", "3"],
        ["--image_format=webp"],
    ):
        with pytest.raises(BaseException, match="drawn"):
            sdxl_gen_img.main(argv_of(stopped, prompts, "--resume_bulk", "--from_file", str(fewer), *other))


def test_names_that_tell_the_time_are_found_by_their_lines(prompts, tmp_path, monkeypatch):
    argv = [word for word in argv_of(tmp_path / "out", prompts, "--resume_bulk") if word != "--sequential_file_name"]
    assert sdxl_gen_img.main(argv) == 0
    before = contents(tmp_path / "out")
    lost = next((tmp_path / "out").glob("im_*"))
    lost.unlink()
    (tmp_path / "out" / "round_002.png").unlink()
    monkeypatch.setattr("time.strftime", lambda form: "20300101000000")
    assert sdxl_gen_img.main(argv) == 0
    after = contents(tmp_path / "out")
    (new,) = after.keys() - before.keys()
    assert new.startswith("im_20300101000000_") and lost.name not in after
    assert after[new] == before[lost.name] and after["round_002.png"] == before["round_002.png"]
    assert [line["number"] for line in entries(tmp_path / "out")] == list(range(1, 13))


def test_two_ranks_draw_what_one_process_draws(whole, prompts, tmp_path):
    printed = two_ranks("sdxl_gen_img", argv_of(tmp_path / "out", prompts, "--prompts_per_rank"), tmp_path)
    assert contents(tmp_path / "out") == contents(whole)
    assert sorted(text.split(" pictures")[0] for text in printed) == ["6", "6"]


def test_what_cannot_be_repeated_is_refused_before_the_model_is_loaded(prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "load_for_drawing", lambda *a, **k: pytest.fail("loaded"))
    for option in ("--resume_bulk", "--prompts_per_rank"):
        base = ["--ckpt", "tiny", "--from_file", str(prompts), "--outdir", str(tmp_path), option]
        assert sdxl_gen_img.main(base) == 2
        printed = capsys.readouterr().err
        assert "4 problems" in printed and "give --seed, or seeds with --d" in printed and "line 2" not in printed
        assert sdxl_gen_img.main([*base, "--shuffle_prompts"]) == 2
        assert "the order of the prompts would be another one" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sdxl_gen_img.main(["--ckpt", "tiny", "--prompt", "a"]) == 2
    assert "add --prompts_per_rank" in capsys.readouterr().err


def test_shares_are_whole_and_disjoint():
    cfg = make_config("sdxl_gen_img", ckpt="tiny", prompt="a", prompts_per_rank=True)
    shares = [share_of(cfg, {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": "1"}) for rank in range(3)]
    assert shares[2] == Share(2, 3, 1) and share_of(cfg, {}) == Share()
    assert [[share.has(batch) for share in shares].count(True) for batch in range(10)] == [1] * 10


def test_without_the_file_nothing_is_written_beside_the_pictures(tmp_path):
    argv = (
        f"--ckpt tiny --prompt red --W 64 --H 64 --steps 1 --outdir {tmp_path} --no_parameters_file --image_format jpeg"
    )
    assert sdxl_gen_img.main(argv.split()) == 0
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".jpg" and Image.open(file).format == "JPEG"


def album(folder, share=None, **options):
    cfg = make_config("sdxl_gen_img", **{"ckpt": "tiny", "prompt": "a", "outdir": str(folder), "seed": 1, **options})
    return Album(cfg, share=share)


def drawn(album, *requests, most=1000):
    """The pictures are as dark as their seed says."""
    with album.job(requests, lambda: [1] * len(requests)) as job:
        for request in job.todo[:most]:
            job.take(request, Image.new("RGB", (8, 8), (request.seed, 0, 0)))
    return job


def test_ranks_put_their_lines_together_however_they_follow_each_other(tmp_path):
    requests = [GenRequest("a", seed=number) for number in range(7)]
    options = {"sequential_file_name": True}
    drawn(album(tmp_path / "alone", **options), *requests)
    shared = {**options, "prompts_per_rank": True}
    for folder, order in (("first", (0, 1, 2)), ("last", (2, 1, 0)), ("last", (1, 2, 0))):  # the third over the second
        for rank in order:
            job = drawn(album(tmp_path / folder, Share(rank, 3), **shared), *requests)
        assert contents(tmp_path / folder) == contents(tmp_path / "alone")
        assert [path.name for path in job.files] == [f"im_{number:06d}.png" for number in range(1, 8)]
    drawn(album(tmp_path / "more", Share(1, 3), **shared), *requests, most=1)  # it stops, and three ranks become two
    assert drawn(album(tmp_path / "more", Share(0, 3), **shared), *requests).files is None
    jobs = [drawn(album(tmp_path / "more", Share(rank, 2), **shared, resume_bulk=True), *requests) for rank in (0, 1)]
    assert [len(job.todo) for job in jobs] == [2, 1] and contents(tmp_path / "more") == contents(tmp_path / "alone")


def test_lines_of_other_runs_stay_and_a_file_has_one_line(tmp_path):
    options = {"sequential_file_name": True}
    drawn(album(tmp_path, **options), GenRequest("a", seed=1), GenRequest("b", seed=1, name="kept"))
    drawn(album(tmp_path, **options), GenRequest("c", seed=2))
    assert [(line["file"], line["prompt"]) for line in entries(tmp_path)] == [("kept.png", "b"), ("im_000001.png", "c")]


def test_batches_stay_what_they_were_and_names_what_they_are_to_be(tmp_path):
    a, b, c, other, d, e = (GenRequest("a", seed=seed, steps=9 if seed == 3 else 8) for seed in range(6))
    everything, sizes = (a, b, c, other, d, e), [2, 1, 1, 2]
    form = Conditioning(TextForm())
    assert [len(batch) for batch in launch.batches(everything, 2, form.layout)] == sizes
    drawn(album(tmp_path, sequential_file_name=True), *everything)
    for number in (3, 5, 6):
        (tmp_path / f"im_{number:06d}.png").unlink()
    options = {"resume_bulk": True, "sequential_file_name": True}
    job = album(tmp_path, **options).job(everything, lambda: sizes)
    assert [[request.seed for request in batch] for batch in launch.batches(job.todo, 2, form.layout)] == [
        [2],
        [4, 5],
    ]
    drawn(album(tmp_path / "time"), *everything)  # names that tell the time are not those of a sequential run
    assert len(album(tmp_path / "time", **options).job(everything, lambda: sizes).todo) == 6
    assert not album(tmp_path / "time", resume_bulk=True).job(everything, lambda: sizes).todo


@pytest.mark.parametrize("ckpt", ["model.safetensors", "folder"])
def test_what_other_files_have_drawn_is_drawn_again(tmp_path, ckpt):
    model, image = tmp_path / ckpt, tmp_path / "control.png"
    if ckpt == "folder":
        model = tmp_path / ckpt / "unet" / "model.safetensors"
        model.parent.mkdir(parents=True)
    model.write_bytes(b"1")
    image.write_bytes(b"1")
    requests = [GenRequest("a", seed=1), GenRequest("a", seed=2, control=(str(image),))]
    options = {"resume_bulk": True, "sequential_file_name": True, "ckpt": str(tmp_path / ckpt)}
    for changed, num_drawn in ((None, 2), (None, 0), (image, 1), (model, 2)):
        if changed:
            changed.write_bytes(b"22")
        assert len(drawn(album(tmp_path / "out", **options), *requests).todo) == num_drawn


def test_what_networks_have_drawn_in_other_places_is_drawn_again(tmp_path):
    mask, network = tmp_path / "mask.png", tmp_path / "network.safetensors"
    for file in (mask, network):
        file.write_bytes(b"1")
    regional = {"mask_path": str(mask), "network_weights": [str(network)], "network_module": ["networks.lora"]}
    options = {"resume_bulk": True, "sequential_file_name": True, **regional}
    request = GenRequest("a AND b", seed=1)
    for changed, num_drawn in ((False, 1), (False, 0), (True, 1)):
        if changed:
            mask.write_bytes(b"22")
        assert len(drawn(album(tmp_path / "out", **options), request).todo) == num_drawn


def test_pictures_in_two_sizes_go_on_one_by_one(tmp_path):
    options = {"sequential_file_name": True}
    requests = [GenRequest("a", seed=seed, highres=HighresFix(0.5, save_first=True)) for seed in (1, 2)]
    for missing in ("im_0000001.png", "im_1000002.png", None):
        with album(tmp_path, **options).job(requests, lambda: [2]) as job:
            for make in (first_stage, lambda request: replace(request, stage="1")):  # a batch's smaller ones first
                for request in map(make, job.todo):
                    job.take(request, Image.new("RGB", (8, 8), (request.seed, int(request.stage), 0)))
        assert len(job.paths) == (4 if missing == "im_0000001.png" else 1)
        assert [(line["file"], line["number"], line["stage"], line["width"]) for line in entries(tmp_path)] == [
            ("im_0000001.png", 1, "0", 512), ("im_1000001.png", 1, "1", 1024),
            ("im_0000002.png", 2, "0", 512), ("im_1000002.png", 2, "1", 1024),
        ]  # fmt: skip
        for number, seed in ((1, 1), (2, 2)):
            for stage in (0, 1):
                with Image.open(tmp_path / f"im_{stage}00000{number}.png") as picture:
                    assert picture.getpixel((0, 0)) == (seed, stage, 0)
        options["resume_bulk"] = True
        if missing:
            (tmp_path / missing).unlink()


def test_an_error_of_writing_is_told_and_the_others_are_written(tmp_path, monkeypatch):
    from library.inference import album as module

    save = module.save_picture

    def fails(picture, path, *args, **kwargs):
        if path.name == "bad.png":
            raise UserError("no space left")
        save(picture, path, *args, **kwargs)

    monkeypatch.setattr(module, "save_picture", fails)
    with pytest.raises(UserError, match="no space left"):
        drawn(album(tmp_path), *(GenRequest("a", seed=1, name=name) for name in ("one", "bad", "two")))
    assert [line["file"] for line in entries(tmp_path)] == ["one.png", "two.png"]
    assert not list(tmp_path.glob(".*"))


def test_pictures_that_a_format_cannot_hold_are_known_before_drawing(tmp_path):
    from library.sizes import Size

    with pytest.raises(UserError, match="WEBP files have at most 16383 pixels"):
        album(tmp_path, image_format="webp").job([GenRequest("a", size=Size(64, 16384), seed=1)], list)


def test_work_is_done_in_order_and_the_giver_waits(monkeypatch):
    saver, done = Saver(), []
    for number in range(3 * MOST_WAITING):
        saver.give(lambda number=number: done.append(number))
        assert number - len(done) < MOST_WAITING
    saver.finish()
    assert done == list(range(3 * MOST_WAITING))
    saver.give(lambda: 1 / 0)
    saver.give(lambda: done.append("after"))
    with pytest.raises(ZeroDivisionError):
        saver.finish()
    assert done[-1] == "after"
    saver.finish()


def test_what_is_no_entry_is_left_out(tmp_path, caplog):
    log = PictureLog(tmp_path)
    (tmp_path / NAME).write_text('{"file": "a.png", "number": 1}\n[3]\nnothing\n\n{"file": "b.png"}\n{"file": "c')
    (tmp_path / "parameters.rank1.jsonl").write_text('{"file": "a.png", "number": 2}\n')
    assert log.entries() == [{"file": "b.png"}, {"file": "a.png", "number": 2}]
    assert "line 2" in caplog.text and "line 3" in caplog.text
    log.start(afresh=True)
    assert (tmp_path / NAME).read_text().endswith('{"file": "b.png"}\n')
    log.settle([{"file": "d.png", "number": 2, "fingerprint": "f"}])
    assert [line["file"] for line in entries(tmp_path)] == ["b.png", "a.png", "d.png"]
    assert not (tmp_path / "parameters.rank1.jsonl").exists()
    shutil.rmtree(tmp_path)
    assert log.entries() == [] and not log.is_there({"file": "a.png", "bytes": 1})
