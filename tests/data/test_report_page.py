"""The page of the dataset report: self-contained, escaped, and with the pictures that it says it has."""

import base64
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from library.data.inspection import InspectionSettings, inspect
from library.data.report_page import LISTED, report_page
from library.data.report_statistics import caption_lengths, repeated_captions, tag_frequencies
from library.data.sources import folders
from tests.data.specs import dataset, subset, write_picture

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'& <!-- ]]> ${x} $data"
LINE = "one\u2028two\u0000\ud7ff"


class Elements(HTMLParser):
    """Collects elements with their attributes, and the text of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self._is_script = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._is_script = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._is_script = self._is_script and tag != "script"

    def handle_data(self, data):
        if self._is_script:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "2_<i>x</i> & 'y' \"z\" 日本"
    write_picture(folder / "<img src=x onerror=alert(3)>.png", 64, 64, caption=EVIL, seed=1)
    write_picture(folder / "copy.png", 64, 64, caption=EVIL, seed=1)
    write_picture(folder / "line.png", 96, 40, caption=LINE, seed=2)
    write_picture(folder / "wide.png", 200, 40, caption="a, b", seed=3)
    return folder


def made(folder, **settings):
    specs = [dataset(subset(folder, flip_aug=True, shuffle_caption=True))]
    defaults = {"count_tokens": lambda texts: [len(text) for text in texts], "thumbnails": 10}
    return inspect(specs, InspectionSettings(**(defaults | settings)))


def data_of(page: str) -> dict:
    return json.loads(Elements(page).scripts[0])


def test_no_name_and_no_caption_becomes_markup(folder):
    page = report_page(made(folder))
    found = Elements(page)
    assert len(found.scripts) == 2
    assert not [name for name, _ in found.elements if name in ("img", "i") and _.get("src")]
    assert not [key for _, attributes in found.elements for key in attributes if key.startswith("on")]
    assert page.count("<script") == 2 and "<img" not in page
    assert "&lt;img src=x onerror=alert(3)&gt;.png" in page and "&lt;/script&gt;" in page
    assert {image["caption"].startswith("</script>") for image in data_of(page)["images"]} == {True, False}


def test_the_page_loads_nothing_and_runs_only_its_own_script(folder):
    page = report_page(made(folder))
    found = Elements(page)
    links = [
        value
        for _, attributes in found.elements
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action", "data", "poster") and value
    ]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"url\(|@import|https?:", page.replace(EVIL, ""))
    policy = next(a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_the_data_holds_every_image_as_it_is_trained(folder):
    found = made(folder, epoch=2)
    images = data_of(report_page(found))["images"]
    assert [image["path"] for image in images] == [image.record.path for image in found.images]
    for shown, image in zip(images, found.images, strict=True):
        assert shown["caption"] == image.caption and shown["ids"] == list(image.size_ids)
        assert shown["crop"] == [image.crop.left, image.crop.top, *image.bucket]
        assert bool(shown.get("flipped")) == image.crop.flipped
    assert {bool(image.get("flipped")) for image in images} == {True, False}


def test_thumbnails_are_the_whole_picture_made_small(folder):
    images = data_of(report_page(made(folder)))["images"]
    for shown in images:
        small = Image.open(io.BytesIO(base64.b64decode(shown["thumbnail"])))
        w, h = shown["original"]
        assert small.format == "JPEG" and max(small.size) == min(160, max(w, h))
        whole = Image.open(shown["path"]).convert("RGB").resize(small.size, Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(small, np.float32) - np.asarray(whole, np.float32)).mean() < 20
    bare = report_page(made(folder, thumbnails=0))
    assert "thumbnail" not in data_of(bare)["images"][0]


def test_masks_go_with_their_pictures(folder, tmp_path, monkeypatch):
    mask = tmp_path / "mask.png"
    Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))).save(mask)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    scan = folders.scan

    def with_masks(spec, *, report, cache_dir):
        for record in scan(spec, report=report, cache_dir=cache_dir):
            masks = {"copy.png": str(mask), "line.png": str(broken)}
            yield dataclasses.replace(record, mask=masks.get(record.path.rsplit("/", 1)[-1]))

    monkeypatch.setattr(folders, "scan", with_masks)
    found = made(folder)
    images = {image["path"].rsplit("/", 1)[-1]: image for image in data_of(report_page(found))["images"]}
    assert [name for name, image in images.items() if "mask" in image] == ["copy.png"]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(images["copy.png"]["mask"]))))
    assert (shown == np.asarray(Image.open(mask))).all()
    (problem,) = [problem for problem in found.problems if problem.kind == "unreadable_mask"]
    assert problem.path.endswith("line.png") and str(broken) in problem.what


def test_long_lists_of_problems_are_cut_with_a_note(folder):
    found = made(folder)
    (problem, *_) = found.problems
    found.problems = [problem._replace(path=f"{number}.png") for number in range(LISTED + 3)]
    page = report_page(found)
    assert f">{LISTED - 1}.png<" in page and f">{LISTED}.png<" not in page and "and 3 more" in page


def test_bins_of_caption_lengths_hold_every_length_and_none_reaches_across_the_limit():
    for lengths in ([], [0], [3, 5, 6], [1, 74, 75, 76, 200], [75, 76, 9000]):
        bins = caption_lengths(lengths)
        assert [count for *_, count in bins] == [sum(first <= n <= last for n in lengths) for first, last, _ in bins]
        assert sum(count for *_, count in bins) == len(lengths) and len(bins) <= 30
        assert not any(first <= 75 < last for first, last, _ in bins)


def test_tags_count_images_once(tmp_path):
    for number, caption in enumerate(["a, b, a", "b", "b", ""]):
        write_picture(tmp_path / f"{number}.png", 64, 64, caption=caption, seed=number)
    images = made(tmp_path).images
    assert list(tag_frequencies(images).items()) == [("b", 3), ("a", 1)]
    assert repeated_captions(images) == {"b": 2}
