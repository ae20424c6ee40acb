"""What the tests of cached wordings share: captions of many orders, and an encoder that tells orders apart."""

import torch

from library.data.assemble import assemble
from library.data.captions import caption_variant
from library.data.table import text_id
from library.data.text_caching import TextCacheOptions, build_text
from tests.data.fakes import fake_text_encoder
from tests.data.specs import dataset, subset, write_folder

NUM = 7
SHUFFLE = {"shuffle_caption": True, "keep_tokens": 1}
MANY_TAGS = "kept, one, two, three, four, five"


def write_pictures(tmp_path):
    """Seven pictures whose captions have many orders."""
    folder = write_folder(tmp_path / "pictures")
    for number in range(NUM):
        (folder / f"p{number}.txt").write_text(f"{MANY_TAGS}, b{number}", encoding="utf-8")
    return folder


class Encoder:
    """Counts what it is asked to encode."""

    def __init__(self):
        self.captions = []
        self.batches = []

    def __call__(self, captions):
        self.captions += captions
        self.batches.append(len(captions))
        return digests(captions)


def digests(captions):
    """Encodings that tell orders of the same letters apart, too."""
    codes = torch.tensor([[float(text_id(c) & 0xFFFF), float(text_id(c) >> 48)] for c in captions])
    encoded = fake_text_encoder(captions)
    return type(encoded)(codes[:, None, :].repeat(1, 77, 1), codes)


def build(folder, *, encode=None, subset_changes=None, **options):
    """A pass over a shuffled folder, three wordings to disk unless told otherwise: store, report and images."""
    images, _ = assemble([dataset(subset(folder, **(SHUFFLE | (subset_changes or {}))))])
    options = TextCacheOptions(
        **({"text_encoder_id": "te", "width_1": 1, "to_disk": True, "num_variants": 3} | options)
    )
    store, report = build_text(images, encode or Encoder(), options=options)
    return store, report, images


def variants(record, count):
    """The wordings that a cache holds of a record."""
    return [caption_variant(record.caption, record.subset, key=record.key, number=number) for number in range(count)]


def same(row, caption):
    """Whether an encoded row is that of a caption."""
    expected = digests([caption])
    return torch.equal(row.hidden_BTD, expected.hidden_BTD) and torch.equal(row.pooled_BP, expected.pooled_BP)


def figures(report):
    """Built, reused, stale and failed."""
    return report.built, report.reused, len(report.stale), len(report.failed)
