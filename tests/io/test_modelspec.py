"""modelspec.* entries and the way training metadata is written."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from pathlib import Path

import pytest

from library.errors import UserError
from library.io.modelspec import FREE_FIELDS, modelspec_metadata, ss_value, thumbnail_url
from library.sizes import Size

CREATED = datetime(2024, 5, 6, 7, 8, 9, 123456)


def test_a_plain_lora_carries_these_entries_and_no_others() -> None:
    assert modelspec_metadata("lora", created=CREATED, title="my_lora") == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.implementation_version": "sdxl-trainer-suite",
        "modelspec.title": "my_lora",
        "modelspec.resolution": "1024x1024",
        "modelspec.date": "2024-05-06T07:08:09",
        "modelspec.prediction_type": "epsilon",
    }


@pytest.mark.parametrize(
    ("kind", "architecture", "title"),
    [
        ("checkpoint", "stable-diffusion-xl-v1-base", "Checkpoint@"),
        ("lora", "stable-diffusion-xl-v1-base/lora", "LoRA@"),
        ("textual-inversion", "stable-diffusion-xl-v1-base/textual-inversion", "TextualInversion@"),
        ("control-net-lllite", "stable-diffusion-xl-v1-base/control-net-lllite", "ControlNetLLLite@"),
        ("controlnet", "stable-diffusion-xl-v1-base/controlnet", "ControlNet@"),
    ],
)
def test_architecture_and_default_title_follow_the_kind(kind, architecture: str, title: str) -> None:
    entries = modelspec_metadata(kind, created=CREATED)
    assert entries["modelspec.architecture"] == architecture
    assert entries["modelspec.title"] == f"{title}{CREATED.timestamp()}"


def test_optional_entries_appear_when_given() -> None:
    fields = {name: f"<{name}>" for name in FREE_FIELDS}
    entries = modelspec_metadata(
        "lora",
        created=CREATED.replace(tzinfo=UTC),
        resolution=Size(768, 512),
        prediction_type="v_prediction",
        clip_skip=2,
        fields=fields,
    )
    assert entries["modelspec.resolution"] == "768x512" and entries["modelspec.prediction_type"] == "v"
    assert entries["modelspec.encoder_layer"] == "2" and entries["modelspec.date"] == "2024-05-06T07:08:09"
    assert {name: entries[f"modelspec.{name}"] for name in FREE_FIELDS} == fields


@pytest.mark.parametrize(
    ("ends", "text"), [((None, None), None), ((200, None), "200,1000"), ((None, 500), "0,500"), ((0, 0), "0,0")]
)
def test_the_timestep_range_is_written_when_an_end_is_given(ends, text: str | None) -> None:
    assert modelspec_metadata("lora", created=CREATED, timestep_range=ends).get("modelspec.timestep_range") == text


def test_unset_fields_are_left_out_and_unknown_ones_refused() -> None:
    assert "modelspec.author" not in modelspec_metadata("lora", created=CREATED, fields={"author": None})
    with pytest.raises(AssertionError, match="autor"):
        modelspec_metadata("lora", created=CREATED, fields={"autor": "x"})


def test_a_thumbnail_becomes_a_data_url(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    url = thumbnail_url(tmp_path / "a.png")
    assert url == "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode() == thumbnail_url(url)
    with pytest.raises(UserError, match="thumbnail") as caught:
        thumbnail_url(tmp_path / "none.png")
    assert caught.value.problems[0].where.endswith("none.png")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "None"), (True, "True"), (0.0001, "0.0001"), (1e-05, "1e-05"), ([1e-4, 2], "[0.0001, 2]"), ("a", "a")],
)
def test_training_metadata_values_are_pythons_text(value: object, text: str) -> None:
    assert ss_value(value) == text
