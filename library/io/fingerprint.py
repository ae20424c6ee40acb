"""What a cache entry was made from, as a short JSON text that is stored inside the entry.

Comparing the stored text with the expected one tells whether the entry may be used and, if not, what changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from library.sizes import Size

LATENT_VERSION = 1
TEXT_VERSION = 1
"""Raised when the meaning of an entry changes, so that entries of older versions are rebuilt."""

_NAMES = {
    "version": "format version",
    "image": "image",
    "mask": "mask",
    "bucket": "bucket",
    "resized": "resized size",
    "crop": "crop",
    "interpolation": "resize interpolation",
    "vae": "VAE",
    "decode": "JPEG decoding",
    "caption": "caption",
    "captions": "caption",
    "text_encoder": "text encoder",
    "max_token_length": "max token length",
    "weighted": "weighted captions",
}


class ImageStamp(NamedTuple):
    """Identity of an image file: bytes, modification time, and (when it was worth reading) a hash of the content."""

    size: int
    mtime_ns: int
    hash: str | None = None


def image_stamp(path: str | os.PathLike[str], *, with_hash: bool = False) -> ImageStamp:
    """Stat the file; entries are written `with_hash`, expectations are made without, which reads nothing."""
    stat = os.stat(path)
    return ImageStamp(stat.st_size, stat.st_mtime_ns, content_hash(path) if with_hash else None)


def content_hash(path: str | os.PathLike[str]) -> str:
    """Return 32 hex digits of BLAKE2b over the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def latent_fingerprint(
    *,
    image: ImageStamp,
    bucket: Size,
    resized: Size,
    crop: tuple[int, int],
    vae_id: str,
    interpolation: str | None = None,
    mask: ImageStamp | None = None,
    decode_scale: int = 1,
    version: int = LATENT_VERSION,
) -> str:
    """Describe a latent: the image, its resize and crop (left, top of the bucket in the resized image), the VAE.

    `mask` is the file that a mask in the entry was made from, the image's own for its alpha; without one it is not
    mentioned. `decode_scale`: by what a JPEG's sides were divided while decoding. It is written only when it is not 1,
    so that entries of whole images stay what they were before there was such a thing.
    """
    optional: dict[str, object] = {} if mask is None else {"mask": list(mask)}
    if decode_scale != 1:
        optional["decode"] = f"1/{decode_scale}"
    return _dump(
        version=version,
        image=list(image),
        bucket=list(bucket),
        resized=list(resized),
        crop=list(crop),
        interpolation=interpolation,
        vae=vae_id,
        **optional,
    )


def text_fingerprint(
    *, caption: str, text_encoder_id: str, max_token_length: int, weighted: bool, version: int = TEXT_VERSION
) -> str:
    """Describe encoded text: a hash of the caption as it was encoded, and the encoders and the way they were used."""
    return _dump(
        version=version,
        caption=hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest(),
        text_encoder=text_encoder_id,
        max_token_length=max_token_length,
        weighted=weighted,
    )


def variants_fingerprint(
    *,
    caption_ids: Sequence[int],
    text_encoder_id: str,
    max_token_length: int,
    weighted: bool,
    version: int = TEXT_VERSION,
) -> str:
    """Describe several wordings of a caption, encoded: their ids of 64 bits in order, which stand for text and length,
    and the encoders. A text that holds more wordings and begins with these describes these, too."""
    return _dump(
        version=version,
        captions="".join(f"{number:016x}" for number in caption_ids),
        text_encoder=text_encoder_id,
        max_token_length=max_token_length,
        weighted=weighted,
    )


def changes(
    stored: str,
    expected: str,
    *,
    image_path: str | os.PathLike[str] | None = None,
    mask_path: str | os.PathLike[str] | None = None,
) -> tuple[str, ...]:
    """Return what differs, in words for the log ("VAE changed", "caption changed"); empty when the entry is good.

    An image touched or copied (same number of bytes, other time) is hashed before it counts as changed, when the
    stored stamp has a hash and the expected one has one too or `image_path` says where to look; so is a mask. A mask in
    the entry does not count when none is expected.
    """
    try:
        old, new = json.loads(stored), json.loads(expected)
        if "mask" not in new:
            old.pop("mask", None)
        differing = [key for key in {**new, **old} if old.get(key) != new.get(key)]
        for key, path in (("image", image_path), ("mask", mask_path)):
            both = key in differing and key in old
            if both and _same_image(ImageStamp(*old[key]), ImageStamp(*new[key]), path):
                differing.remove(key)
        if "captions" in differing:
            return _wording_changes(old, new, [key for key in differing if key not in ("caption", "captions")])
    except (ValueError, TypeError, AttributeError, KeyError):
        return ("fingerprint unreadable",)
    return _sentences(differing)


def _sentences(differing: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{_NAMES.get(key, key)} changed" for key in differing)


def _wording_changes(old: Mapping[str, str], new: Mapping[str, str], others: Sequence[str]) -> tuple[str, ...]:
    """What differs when the ids of the wordings do; they also depend on the way of encoding."""
    if {"max_token_length", "weighted"} & set(others):
        return _sentences(others)
    before, after = old.get("captions", ""), new.get("captions", "")
    if after and before.startswith(after):
        return _sentences(others)
    if not before or not after or after.startswith(before):
        return ("number of caption variants changed", *_sentences(others))
    return _sentences(["captions", *others])


def _same_image(old: ImageStamp, new: ImageStamp, path: str | os.PathLike[str] | None) -> bool:
    if old.size != new.size:
        return False
    if old.hash is not None and new.hash is not None:
        return old.hash == new.hash
    if old.mtime_ns == new.mtime_ns:
        return True
    if path is None or old.hash is None:
        return False
    try:
        return content_hash(path) == old.hash
    except OSError:
        return False


def _dump(**parts: object) -> str:
    return json.dumps(parts, separators=(",", ":"), ensure_ascii=False)
