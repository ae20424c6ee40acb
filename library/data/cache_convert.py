"""Turns npz files into entries of a packed cache, and back into files that sd-scripts reads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.data.cache_places import require_writable
from library.data.cache_survey import Kind, NpzPart, PackedPart, Survey, is_entry, usable_numbers
from library.data.latent_backends import made_from
from library.data.latent_caching import LatentPass
from library.data.packed_entries import arrays_of, entry_of, facts_of, latent_ids, recipe, stamp_of, vae_of
from library.data.packed_text import Recipe, arrays_of_text, file_entry_of
from library.data.progress import progress_bar
from library.data.records import READ_ERRORS, PlacedImage, Skipped
from library.diffusion.crops import legacy_crop_ltrb
from library.io import fingerprint, latent_cache, npz_file, text_cache
from library.io.packed_store import PackedStore
from library.io.packed_writer import PackedWriter
from library.sizes import Size

_MOMENTS = {"moments", "moments_flipped"}


@dataclass
class Converted:
    """What became of the entries of one kind: written, there already, not convertible; and files removed after."""

    kind: Kind
    written: int = 0
    there: int = 0
    removed: int = 0
    failed: list[Skipped] = field(default_factory=list)


class Record(NamedTuple):
    """What an npz file is in a packed cache."""

    arrays: dict[str, np.ndarray]
    recipe: str
    key: str
    facts: np.ndarray | None


def pack(survey: Survey, kind: Kind, *, remove: bool = False) -> Converted:
    """Copy the usable npz entries of the data set into its packed cache and read every one back.

    Entries of other programs, whose model nobody knows, are taken as they are used: when they fit. With `remove` the
    files whose every array was found in the packed cache are deleted. Raises UserError when the cache cannot be
    written.
    """
    part, packed = survey.npz_part(kind), survey.packed_part(kind)
    ids, done = _ids(survey, part), Converted(kind)
    there = {int(packed.packed.ids[number]) for number in usable_numbers(packed)}
    numbers = usable_numbers(part)
    if any(int(ids[number]) not in there for number in numbers):
        require_writable([packed.store.folder])
    good = []
    with (
        PackedWriter(packed.store.folder, recipe="", facts_dtype=packed.store.facts_dtype) as writer,
        progress_bar(len(numbers), title=f"packing {kind}", unit="entry") as bar,
    ):
        for number in numbers:
            bar.update()
            try:
                if int(ids[number]) in there:
                    done.there += 1
                else:
                    record = _record(part, number)
                    writer.use_recipe(record.recipe)
                    writer.append(int(ids[number]), record.arrays, key=record.key, facts=record.facts)
                    there.add(int(ids[number]))
                    done.written += 1
                good.append(number)
            except READ_ERRORS as error:
                done.failed.append(Skipped.because_of(str(part.path(number)), error))
    store = PackedStore.open(packed.store.folder, facts_dtype=packed.store.facts_dtype)
    _confirm(part, good, ids, store, done, remove=remove)
    store.save_index()
    return done


def unpack(survey: Survey, kind: Kind) -> Converted:
    """Write npz files, where sd-scripts looks for them or below --cache_dir, of usable entries of the packed cache.

    Files that are right stay; so do other programs' keys in a file that is written again. Raises UserError when a
    folder cannot be written to.
    """
    part, packed = survey.npz_part(kind), survey.packed_part(kind)
    ids, done = _ids(survey, part), Converted(kind)
    positions = _usable_positions(packed)
    there = set(usable_numbers(part))
    done.there = len(there & {number for number in range(len(ids)) if int(ids[number]) in positions})
    wanted = [n for n in range(len(ids)) if n not in there and int(ids[n]) in positions]
    require_writable({part.path(number).parent for number in wanted})
    with progress_bar(len(wanted), title=f"unpacking {kind}", unit="entry") as bar:
        for number in wanted:
            bar.update()
            try:
                write = _write_latents if kind == "latents" else _write_text
                write(part, number, packed.store, positions[int(ids[number])], survey)
                done.written += 1
            except READ_ERRORS as error:
                done.failed.append(Skipped.because_of(str(part.path(number)), error))
    return done


def _ids(survey: Survey, part: NpzPart) -> np.ndarray:
    """The ids that the npz targets have in the packed cache (uint64)."""
    if isinstance(part.work, LatentPass):
        return latent_ids(part.work.table, part.work.targets.first)
    return part.work.targets.first_ids


def _usable_positions(packed: PackedPart) -> dict[int, int]:
    ids = packed.packed.ids[usable_numbers(packed)]
    return dict(zip(ids.tolist(), packed.store.find(ids).tolist(), strict=True))


def _record(part: NpzPart, number: int) -> Record:
    """Read a file as what it will be. Raises what reading can raise."""
    path = part.path(number)
    if isinstance(part.work, LatentPass):
        image = part.work.image(number)
        is_ours = part.checks[number].status == "valid"
        # Another program that rewrites latents leaves the moments of older ones in the file.
        moments = is_ours and "moments" in npz_file.peek(path).shapes
        entry = latent_cache.read(path, with_mask=bool(part.work.has_mask[number]), moments=moments)
        model = _named(entry.fingerprint, "vae") if is_ours else None
        return Record(arrays_of(entry), recipe(model), image.record.key, facts_of(image))
    text = text_cache.read(path)
    model = _named(text.fingerprint, "text_encoder") if part.checks[number].status == "valid" else None
    made_by = Recipe(model, text.hidden_state1.shape[-1])
    return Record(arrays_of_text(text), made_by.text(), part.work.text(number), None)


def _named(made_from: str | None, key: str) -> str | None:
    return json.loads(made_from)[key] if made_from else None


def _confirm(
    part: NpzPart, numbers: list[int], ids: np.ndarray, store: PackedStore, done: Converted, *, remove: bool
) -> None:
    """Compare what was packed with the files; delete those that say nothing more."""
    positions = store.find(ids[numbers])
    with progress_bar(len(numbers), title=f"reading back {part.kind}", unit="entry") as bar:
        for number, position in zip(numbers, positions.tolist(), strict=True):
            bar.update()
            path = part.path(number)
            try:
                same = position >= 0 and _is_same(part, number, store, position)
            except READ_ERRORS as error:
                done.failed.append(Skipped.because_of(str(path), error))
                continue
            if not same:
                done.failed.append(Skipped(str(path), "the packed cache holds another entry for it"))
            elif remove and is_entry(path, part.kind) and _is_whole(part, number, store, position):
                path.unlink()
                done.removed += 1


def _is_same(part: NpzPart, number: int, store: PackedStore, position: int) -> bool:
    record, packed = _record(part, number), store.read(position)
    # An entry that was packed without moments serves as before.
    wanted = record.arrays.keys() - (_MOMENTS - packed.keys())
    if packed.keys() >= wanted and all(np.array_equal(packed[name], record.arrays[name]) for name in wanted):
        return True
    # Equal captions are packed once; encoded in different batches they differ in the last bits.
    if part.kind != "text" or record.recipe != _recipe_of(store, position):
        return False
    return Recipe.parse(record.recipe).text_encoder is not None


def _recipe_of(store: PackedStore, position: int) -> str:
    return store.recipes[int(store.recipe_of(np.array([position]))[0])]


def _is_whole(part: NpzPart, number: int, store: PackedStore, position: int) -> bool:
    """Whether the packed entry holds all that the file does: a mask or a variant that is not in use would be lost."""
    keys = set(npz_file.peek(part.path(number)).shapes) - {"fingerprint", "fingerprint_crc"}
    if isinstance(part.work, LatentPass):
        packed = {"latents", "latents_flipped", "original_size", "crop_ltrb"}
        packed |= _MOMENTS & store.read(position).keys()
        return keys <= (packed | {"alpha_mask"} if part.work.has_mask[number] else packed)
    return keys <= {"hidden_state1", "hidden_state2", "pool2"}


def _write_latents(part: NpzPart, number: int, store: PackedStore, position: int, survey: Survey) -> None:
    assert isinstance(part.work, LatentPass)
    image, one = part.work.image(number), np.array([position])
    facts = store.facts(one)[0]
    entry = entry_of(store.read(position), original=Size(*map(int, facts["original"])))
    entry = latent_cache.LatentEntry(
        entry.latents_4hw,
        entry.flipped_4hw,
        entry.original,
        legacy_crop_ltrb(image.placement.bucket, image.record.size),
        mask_HW=entry.mask_HW,
        moments_8hw=entry.moments_8hw,
        flipped_moments_8hw=entry.flipped_moments_8hw,
    )
    vae = vae_of(_recipe_of(store, position))
    latent_cache.write(part.path(number), entry, None if vae is None else _latent_text(image, facts, vae))


def _latent_text(image: PlacedImage, facts: np.void, vae: str) -> str:
    mask = None if image.record.mask is None else stamp_of(facts, "mask_")
    return made_from(image, vae_id=vae, stamp=stamp_of(facts), mask_stamp=mask)


def _write_text(part: NpzPart, number: int, store: PackedStore, position: int, survey: Survey) -> None:
    assert not isinstance(part.work, LatentPass)
    encoder, width_1 = Recipe.parse(_recipe_of(store, position))
    made = None
    if encoder is not None:
        made = fingerprint.text_fingerprint(
            caption=part.work.text(number),
            text_encoder_id=encoder,
            max_token_length=survey.max_token_length,
            weighted=survey.weighted,
        )
    text_cache.write(Path(part.path(number)), file_entry_of(store.read(position), width_1=width_1), made)
