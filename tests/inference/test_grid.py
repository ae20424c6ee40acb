"""Contact sheets with axes: which pictures they have, and how they look."""

import pytest
from PIL import Image, ImageFont

import sdxl_gen_img
from library.errors import UserError
from library.inference import grid_files, run
from library.inference.grid import Axis, Sheet, plan_grid, read_axes
from library.inference.grid_files import MOST_PIXELS, SMALLEST, look_of, parts_of, write_sheet
from library.inference.parameters_text import read_parameters
from library.inference.picture_text import texts_of
from library.inference.plan import PlanOptions, plan
from library.inference.prompt_source import PromptLine
from library.inference.request import GenRequest
from library.inference.sheet import GAP, Labels, Look, draw_sheet, fitted, sheet_size, wrapped
from library.inference.writer import PARAMETERS, save_picture
from library.sizes import Size

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and NumPy 2


def planned(words, *texts, num_networks=2, **how):
    lines = [PromptLine(text, f"line {number}") for number, text in enumerate(texts, start=1)]
    axes = read_axes(words.split(), num_networks=num_networks)
    return plan_grid(lines, axes, GenRequest(), PlanOptions(**how))


def told(grid, number, field):
    """A field of every picture of a sheet, in rows and columns."""
    return [[getattr(grid.requests[index], field) for index in row] for row in grid.sheets[number].cells]


# --- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "rows", "columns"),
    [
        ("seeds", Axis("prompts"), Axis("seeds")),
        ("prompts", Axis("prompts"), Axis("seeds")),
        ("prompts x seeds", Axis("prompts"), Axis("seeds")),
        ("seeds=3,1 × prompts", Axis("seeds", (3, 1)), Axis("prompts")),
        ("steps=10,20 scale=3,7.5", Axis("steps", (10, 20)), Axis("scale", (3.0, 7.5))),
        ("steps = 10, 20", Axis("prompts"), Axis("steps", (10, 20))),
        ('prompts x "steps=10,20"', Axis("prompts"), Axis("steps", (10, 20))),
        ("network_mul=0,0.5/1,-1", Axis("prompts"), Axis("network_mul", ((0.0,), (0.5, 1.0), (-1.0,)))),
        (
            "size=512x768,64X64 negative_scale=none,2",
            Axis("size", (Size(512, 768), Size(64, 64))),
            Axis("negative_scale", (None, 2.0)),
        ),
        ("sampler=euler_a,ddim eta=0,1", Axis("sampler", ("euler_a", "ddim")), Axis("eta", (0.0, 1.0))),
    ],
)
def test_axes_are_read(words, rows, columns):
    assert read_axes(words.split(), num_networks=2) == read_axes([words], num_networks=2) == (rows, columns)


@pytest.mark.parametrize(
    ("words", "place", "what", "fix"),
    [
        ("prompts x stps=3", "stps", "is no axis", "did you mean steps?"),
        ("cfg=3", "cfg", "is no axis", "did you mean scale?"),
        ("zzz", "zzz", "is no axis", "known: prompts, seeds, steps"),
        ("steps=10,x", "x", "must be a whole number from 1 to 1000", ""),
        ("steps=1001", "1001", "must be a whole number from 1 to 1000", ""),
        ("scale=1e999", "1e999", "is too large", ""),
        ("scale=a", "a", "is not a number", ""),
        ("eta=1.5", "1.5", "must lie between 0 and 1", ""),
        ("sampler=eular", "eular", "did you mean euler?", ""),
        ("size=100x64", "100x64", "two multiples of 8", ""),
        ("steps=3,4,3", "3", "is there twice", ""),
        ("steps", "steps", "steps has no values", "write steps=a,b,c"),
        ("steps=", "steps=", "steps has no values", "write steps=a,b,c"),
        ("steps=3,,4", "", "the value must be a whole number", ""),
        ("prompts=a", "=a", "prompts takes no values", "remove it"),
        ("network_mul=1/2/3", "1/2/3", "there are 2 networks", ""),
        ("steps=1 steps=2", "steps=2", "steps is an axis already", ""),
        ("steps=1 scale=2 seeds", "seeds", "a sheet has two axes", ""),
        ("x", "x", "no axis is named", ""),
    ],
)
def test_mistakes_have_carets(words, place, what, fix):
    with pytest.raises(UserError) as error:
        read_axes(words.split(), num_networks=2)
    (problem,) = error.value.problems
    assert what in problem.what and fix in problem.fix
    _, text, carets = problem.where.split("\n")
    assert text[carets.index("^") :].startswith(place) and carets.count("^") == max(len(place), 1)


# --- plans -------------------------------------------------------------------------------------------------------


def test_prompts_are_rows_and_share_their_seeds():
    grid = planned("seeds", "a {red|blue} cat", "b --d 5", "c", images_per_prompt=3, seed=1)
    (sheet,) = grid.sheets
    shared = [request.seed for request in plan([PromptLine("a")], GenRequest(), PlanOptions(3, seed=1))]
    assert told(grid, 0, "seed") == [shared, [5, *shared[1:]], shared]
    assert sheet.rows == ("a {red|blue} cat", "b --d 5", "c") and sheet.title == ""
    assert sheet.columns == ("picture 1", f"seed {shared[1]}", f"seed {shared[2]}")
    assert sheet.cells == ((0, 1, 2), (3, 4, 5), (6, 7, 8))
    (other,) = planned("seeds x prompts", "a", "b", images_per_prompt=2, seed=1).sheets
    assert other.columns == ("a", "b") and len(other.rows) == 2 and other.cells == ((0, 1), (2, 3))


def test_values_come_before_the_line_and_the_line_draws_the_same_again():
    grid = planned("steps=2,3 x network_mul=0,0.5/1", "a --s 9 --n bad", seed=7)
    (sheet,) = grid.sheets
    assert told(grid, 0, "steps") == [[2, 2], [3, 3]]
    assert told(grid, 0, "network_muls") == [[(0.0,), (0.5, 1.0)]] * 2
    assert {request.seed for request in grid.requests} == {7}
    assert (sheet.rows, sheet.columns) == (("steps 2", "steps 3"), ("network_mul 0", "network_mul 0.5, 1"))
    assert sheet.title == "a --s 9 --n bad, seed 7"
    for words in (
        "size=64x96,128x64 negative_scale=none,2",
        "seeds=4,5 scale=3,5",
        "steps=2,3 network_mul=0,0.5/1",
        "strength=0.5,1",
    ):
        for request in planned(words, "a --s 9 --n {x|y}", seed=7).requests:
            (again,) = plan([PromptLine(request.raw)], GenRequest(), PlanOptions(seed=request.seed))
            assert (again.size, again.steps, again.scale, again.negative) == (
                request.size, request.steps, request.scale, request.negative,
            )  # fmt: skip
            assert (again.negative_scale, again.network_muls, again.seed, again.strength) == (
                request.negative_scale, request.network_muls, request.seed, request.strength,
            )  # fmt: skip


def test_seeds_of_the_axis_come_before_all_others_and_choose_the_words(caplog):
    line = "a {red|green|blue|white|black} cat --d 5"
    grid = planned("seeds=11,12", line, line, images_per_prompt=3, seed=1)
    assert told(grid, 0, "seed") == [[11, 12]] * 2 and grid.sheets[0].columns == ("seed 11", "seed 12")
    for seed, request in zip((11, 12), grid.requests, strict=False):
        assert (
            request.prompt == plan([PromptLine(line.split(" --d")[0])], GenRequest(), PlanOptions(seed=seed))[0].prompt
        )
    assert "images_per_prompt is ignored: the grid names 2 seeds" in caplog.text


def test_what_is_no_axis_has_a_sheet_each():
    grid = planned("steps=1,2 scale=3,4", "a", "b", images_per_prompt=2, n_iter=2, seed=1)
    assert len(grid.sheets) == 8 and len(grid.requests) == 32
    assert [sheet.title[0] for sheet in grid.sheets] == list("aabb" * 2)
    seeds = [{seed for row in told(grid, number, "seed") for seed in row} for number in range(8)]
    assert all(len(found) == 1 for found in seeds) and seeds[0] == seeds[2] != seeds[1] and seeds[0] != seeds[4]
    assert sorted(index for sheet in grid.sheets for row in sheet.cells for index in row) == list(range(32))


def test_combinations_are_rows_of_their_own():
    grid = planned("scale=1,2", "{e$$a|b} cat", "dog", seed=1)
    assert grid.sheets[0].rows == ("a cat", "b cat", "dog")
    assert [request.prompt for request in grid.requests] == ["a cat"] * 2 + ["b cat"] * 2 + ["dog"] * 2


def test_what_no_sampler_draws_and_a_single_seed_are_refused():
    with pytest.raises(UserError, match="heun has no eta"):
        planned("sampler=heun,ddim eta=0,1", "a")
    with pytest.raises(UserError, match="seeds has one value only"):
        planned("seeds scale=1,2", "a")
    assert len(planned("prompts", "a", "b").requests) == 2


# --- drawing -----------------------------------------------------------------------------------------------------


def test_cells_lie_where_rows_and_columns_cross():
    sizes = [[Size(10, 20), None, Size(8, 8)], [Size(30, 5), None, None]]
    look = Look(margin=40, head=30, font=10, line=13, title=17)
    sheet = draw_sheet(sizes, lambda r, c: Image.new("RGB", sizes[r][c], (r + 1, c + 1, 0)),
                       labels=Labels(["r"] * 2, ["c"] * 3, "t"), look=look)  # fmt: skip
    assert sheet.size == sheet_size(sizes, look) == (40 + 30 + 64 + 8 + 3 * GAP, 17 + 30 + 20 + 5 + 2 * GAP)
    assert sheet.getpixel((40, 47)) == sheet.getpixel((49, 66)) == (1, 1, 0) and sheet.getpixel((50, 47)) == (255,) * 3
    assert sheet.getpixel((40 + 30 + 64 + 2 * GAP, 47)) == (1, 3, 0)
    assert sheet.getpixel((69, 47 + 20 + GAP + 4)) == (2, 1, 0)
    for box in ((0, 0, 150, 17), (0, 47, 40, 67), (0, 71, 40, 80), (40, 17, 60, 47)):  # labels
        assert sheet.crop(box).getextrema()[0][0] < 128


@pytest.mark.parametrize("text", ["", "a", "word " * 30, "x" * 300, "猫" * 50, "dpmpp_2m_sde_karras and more"])
@pytest.mark.parametrize("width", [1, 40, 200])
def test_lines_are_no_wider_than_they_may_be(text, width):
    font = ImageFont.load_default(14)
    lines = list(wrapped(text, font, width))
    assert "".join(lines).replace(" ", "") == text.replace(" ", "") and lines
    assert all(len(line) <= 1 or font.getlength(line) <= width for line in lines)
    few = fitted(text, font, width, 2)
    assert len(few) <= 2 and (few == lines or few[-1].endswith("..."))


@pytest.mark.parametrize(
    ("rows", "columns", "side", "longest", "is_single", "is_whole"),
    [
        (1, 1, 64, None, True, True),
        (3, 4, 1024, 16383, True, True),
        (40, 30, 1024, None, True, False),
        (2, 400, 512, None, True, False),
        (2, 400, 512, 16383, False, False),
        (700, 9, 96, None, True, True),
        (700, 9, 96, 16383, False, True),
    ],
)
def test_parts_are_whole_and_fit(rows, columns, side, longest, is_single, is_whole):
    sizes = [[Size(side, side // 2)] * columns] * rows
    labels = Labels([f"row {number}" for number in range(rows)], ["a column"] * columns, "title")
    parts = list(parts_of(sizes, labels, longest))
    cells = [(row, column) for part in parts for row in part.rows for column in part.columns]
    assert len(cells) == len(set(cells)) == rows * columns
    for part in parts:
        assert part.scale == 1 or side * part.scale >= SMALLEST
        small = Size(round(side * part.scale), round(side // 2 * part.scale))
        scaled = [[small] * len(part.columns)] * len(part.rows)
        own = Labels([labels.rows[row] for row in part.rows], ["a column"] * len(part.columns), "title")
        size = sheet_size(scaled, look_of(scaled, own))
        assert max(size) <= (longest or max(size)) and size.w * size.h <= MOST_PIXELS
    assert ((len(parts) == 1), all(part.scale == 1 for part in parts)) == (is_single, is_whole)


def test_a_sheet_that_is_too_large_is_several_files(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(grid_files, "MOST_PIXELS", 50_000)
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for number, file in enumerate(files):
        save_picture(Image.new("RGB", (128, 128), (number, 0, 0)), file, {PARAMETERS: f"{number}\nSteps: 1"})
    sheet = Sheet(("prompts", "steps"), ("a", 'b "quoted", c'), ("steps 1", "steps 2"), ((0, 1), (2, 3)), "the title")
    written = write_sheet(sheet, files, tmp_path / "grid.jpg")
    assert [path.name for path in written] == ["grid_1.jpg", "grid_2.jpg"]
    assert "it becomes 2" in caplog.text and "scaled by" in caplog.text
    prompt, _, settings = read_parameters(texts_of(written[1])[PARAMETERS])
    assert prompt == "2" and settings["Script"] == "X/Y/Z plot"
    assert settings["X Type"] == "Steps" and settings["X Values"] == "1, 2" and settings["Y Values"] == 'b "quoted", c'


def test_the_generator_draws_sheets_and_goes_on_with_them(tmp_path, capsys, monkeypatch):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle\na star --w 64\n")
    argv = f"--ckpt tiny --from_file {prompts} --outdir {out} --W 96 --H 64 --seed 1 --sequential_file_name".split()
    grid = ["--grid", "steps=1,2", "--scale", "1"]
    assert sdxl_gen_img.main([*argv, *grid]) == 0
    printed = capsys.readouterr().out
    assert "5 pictures in" in printed and "grid_000001.png" in printed
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with Image.open(out / "grid_000001.png") as sheet:
        right = sheet.width - 2 * (96 + GAP)
        for number, (column, row) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1)), start=1):
            drawn = Image.open(out / f"im_{number:06d}.png")
            left, top = right + column * (96 + GAP), sheet.height - (2 - row) * (64 + GAP)
            assert sheet.crop((left, top, left + drawn.width, top + 64)).tobytes() == drawn.tobytes()
            assert drawn.text["steps"] == str(column + 1) and drawn.text["raw-prompt"].endswith(f"--s {column + 1}")
        assert 'X Type: Steps, X Values: "1, 2", Y Type: Prompt S/R' in sheet.text["parameters"]
    two = [*argv, "--outdir", str(tmp_path / "two"), "--steps", "1", "--grid", "prompts", "seeds=1"]
    highres = ["--highres_fix_scale", "0.7", "--highres_fix_steps", "1", "--strength", "1", "--highres_fix_save_1st"]
    assert sdxl_gen_img.main([*two, *highres]) == 0
    with Image.open(tmp_path / "two" / "grid_000001.png") as sheet:
        drawn = Image.open(tmp_path / "two" / "im_1000002.png")
        left, top = sheet.width - 96 - GAP, sheet.height - 64 - GAP
        assert sheet.crop((left, top, left + drawn.width, top + 64)).tobytes() == drawn.tobytes(), "the whole pictures"
    for name in ("grid_000001.png", "im_000003.png"):
        (out / name).unlink()
    assert sdxl_gen_img.main([*argv, *grid, "--resume_bulk"]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    monkeypatch.setattr(run, "load_for_drawing", lambda *a, **k: pytest.fail("loaded"))
    assert sdxl_gen_img.main([*argv, "--grid", "network_mul=0,1", "stps=3"]) == 2
    printed = capsys.readouterr().err
    assert "no network is loaded" in printed and "did you mean steps?" in printed
