"""What a safetensors header says, in a readable form; plain Python, no weights are read."""

from __future__ import annotations

import argparse
import base64
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.io.atomic import atomic_path
from library.io.header_edit import MODEL_HASH, data_hash, edit_header
from library.io.modelspec import thumbnail_url
from library.io.safetensors_header import TensorInfo, read_header

THUMBNAIL = "modelspec.thumbnail"
_STRUCTURED = ("ss_tag_frequency", "ss_datasets", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_bucket_info")
_HASHES = ("sshs_", "ss_sd_model_", "ss_new_sd_model_", "ss_vae_", "ss_new_vae_", "modelspec.hash")
_WIDTH = 100


def run(arguments: argparse.Namespace) -> int:
    """Edit if asked, then show; returns the exit code. Raises UserError for broken files and edits without sense."""
    path = Path(arguments.file or arguments.model or "")
    if not (arguments.file or arguments.model):
        raise UserError("no file is named", "command line", "name a safetensors file")
    if arguments.edit or arguments.remove:
        changes = dict(_pair(text) for text in arguments.edit)
        if twice := sorted(changes.keys() & set(arguments.remove)):
            raise UserError(f"{twice[0]} is both edited and removed", "command line", "choose one")
        target = Path(arguments.save_to) if arguments.save_to else None
        edit_header(path, changes=changes, removed=frozenset(arguments.remove), target=target)
        path = target or path
        print(f"written: {path} ({len(changes)} changed, {len(arguments.remove)} removed)")
    elif arguments.save_to:
        raise UserError("save_to needs edit or remove", "--save_to", "leave it out: there is nothing to write")
    metadata, tensors = read_header(path)
    if arguments.thumbnail:
        _save_thumbnail(metadata, Path(arguments.thumbnail), where=str(path))
    if arguments.json:
        print(json.dumps(decoded(metadata), indent=2, ensure_ascii=False, sort_keys=True))
    elif not (arguments.edit or arguments.remove or arguments.thumbnail):
        for line in report(metadata, tensors, path=path, top=arguments.top):
            print(line)
    return 0


def decoded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The texts by key, those that hold JSON tables and lists as such; the thumbnail as its length."""
    found: dict[str, Any] = {}
    for key, text in metadata.items():
        found[key] = text
        if key == THUMBNAIL:
            found[key] = f"{text[:30]}… ({len(text)} characters)"
        elif text[:1] in ("{", "["):
            try:
                found[key] = json.loads(text)
            except ValueError:
                continue
    return found


def report(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo], *, path: Path, top: int) -> Iterator[str]:
    """Lines: file, model, hashes, data, tags, training, everything else."""
    kinds = Counter(info.dtype for info in tensors.values())
    yield f"{path}: {path.stat().st_size:,} bytes, {len(tensors)} tensors " + ", ".join(
        f"{count} {dtype}" for dtype, count in kinds.most_common()
    )
    if not metadata:
        yield "the header holds no texts"
        return
    left = dict(metadata)
    spec = {key: left.pop(key) for key in list(left) if key.startswith("modelspec.")}
    if spec:
        title = spec.pop("modelspec.title", "")
        yield from _section("model", {"title": title} | {key.removeprefix("modelspec."): spec[key] for key in spec})
    hashes = {key: left.pop(key) for key in list(left) if key.startswith(_HASHES) and not key.endswith("_name")}
    if MODEL_HASH in hashes:
        state = "right" if data_hash(path) == hashes[MODEL_HASH] else "NOT that of these tensors"
        hashes[MODEL_HASH] += f" ({state})"
    yield from _section("hashes", hashes)
    structured = {key: _json(left.pop(key)) for key in _STRUCTURED if key in left}
    yield from _data(structured)
    yield from _tags(structured.get("ss_tag_frequency"), top)
    training = {key.removeprefix("ss_"): left.pop(key) for key in list(left) if key.startswith("ss_")}
    yield from _section("training", training)
    yield from _section("other", left)


def _section(title: str, values: Mapping[str, str]) -> Iterator[str]:
    shown = {key: value for key, value in sorted(values.items()) if value not in ("", "None")}
    if not shown:
        return
    yield ""
    yield title
    width = max(map(len, shown))
    for key, value in shown.items():
        text = " ".join(value.split())
        yield f"  {key.ljust(width)}  {text if len(text) <= _WIDTH else text[: _WIDTH - 1] + '…'}"


def _data(structured: Mapping[str, Any]) -> Iterator[str]:
    """Data sets with their folders, or the folders alone."""
    lines: list[str] = []
    datasets = structured.get("ss_datasets")
    for number, dataset in enumerate(datasets if isinstance(datasets, list) else [], start=1):
        lines.append(
            f"  {number}. resolution {dataset.get('resolution')}, batch {dataset.get('batch_size_per_device')}, "
            f"{dataset.get('num_train_images')} images with repeats"
            + (f", buckets {dataset.get('min_bucket_reso')}-{dataset.get('max_bucket_reso')}" * _has(dataset))
        )
        for subset in dataset.get("subsets", []):
            name = subset.get("image_dir") or subset.get("metadata_file")
            is_reg = ", regularisation" if subset.get("is_reg") else ""
            lines.append(f"     {name}: {subset.get('img_count')} images x {subset.get('num_repeats')}{is_reg}")
    for key, note in (("ss_dataset_dirs", ""), ("ss_reg_dataset_dirs", ", regularisation")):
        table = structured.get(key)
        if isinstance(table, dict) and not datasets:
            lines += [f"  {n}: {v.get('img_count')} images x {v.get('n_repeats')}{note}" for n, v in table.items()]
    if lines:
        yield from ("", "data", *lines)


def _has(dataset: Mapping[str, Any]) -> bool:
    return bool(dataset.get("enable_bucket"))


def _tags(frequency: Any, top: int) -> Iterator[str]:
    """The most frequent tags over all folders."""
    total: Counter[str] = Counter()
    for table in frequency.values() if isinstance(frequency, dict) else ():
        if isinstance(table, dict):
            total.update({str(tag).strip(): int(count) for tag, count in table.items()})
    if total:
        yield ""
        yield f"tags ({len(total)}, the {min(top, len(total))} most frequent)"
        width = len(str(max(total.values())))
        yield from (f"  {count:>{width}}  {tag}" for tag, count in total.most_common(top))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"{text!r} is not key=value", "--edit", 'write it as --edit modelspec.title="a title"')
    return key, thumbnail_url(value) if key == THUMBNAIL else value


def _save_thumbnail(metadata: Mapping[str, str], target: Path, *, where: str) -> None:
    head, _, data = metadata.get(THUMBNAIL, "").partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise UserError("there is no thumbnail in the header", where, "leave --thumbnail out")
    try:
        content = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise UserError(f"the thumbnail cannot be read ({error})", where) from None
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
    print(f"written: {target} ({head.removeprefix('data:').removesuffix(';base64')})")
