"""Renaming between layouts: both directions, lazily, and nothing lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.io.keymap import KeyMap, UnmappedKeys, conv1x1, rename, split, transpose

QKV = ("attn.q.weight", "attn.k.weight", "attn.v.weight")


@pytest.fixture(scope="module")
def keymap() -> KeyMap:
    return KeyMap(
        [
            rename("input_blocks.1", "down.0"),
            rename("input_blocks.1.0.in_layers.2", "down.0.resnets.0.conv1"),
            rename("input_blocks.11", "down.11"),
            split("attn.in_proj_weight", QKV),
            transpose("projection", "projection.weight"),
            rename("mid.q", "mid.to_q"),
            conv1x1("mid.q.weight", "mid.to_q.weight"),
        ]
    )


def _side_a() -> dict[str, torch.Tensor]:
    return {
        "input_blocks.1.0.in_layers.2.weight": torch.randn(2, 2, 3, 3),
        "input_blocks.1.0.in_layers.0.bias": torch.randn(2),
        "input_blocks.11.x": torch.randn(1),
        "attn.in_proj_weight": torch.randn(9, 4),
        "projection": torch.randn(3, 5),
        "mid.q.weight": torch.randn(4, 4, 1, 1),
        "mid.q.bias": torch.randn(4),
    }


def test_the_longest_rule_wins_at_dots_only(keymap: KeyMap) -> None:
    assert keymap.name("input_blocks.1.0.in_layers.2.weight") == "down.0.resnets.0.conv1.weight"
    assert keymap.name("input_blocks.1.0.in_layers.0.bias") == "down.0.0.in_layers.0.bias"
    assert keymap.name("input_blocks.1") == "down.0"
    assert keymap.name("input_blocks.11.x") == "down.11.x"
    assert keymap.name("input_blocks.12.x") is None
    assert keymap.name("down.0.resnets.0.conv1.bias", reverse=True) == "input_blocks.1.0.in_layers.2.bias"


def test_split_tensors_have_no_single_new_name(keymap: KeyMap) -> None:
    assert keymap.name("attn.in_proj_weight") is None and keymap.name("attn.q.weight", reverse=True) is None


def test_values_are_converted(keymap: KeyMap) -> None:
    source = _side_a()
    view = keymap.view(source)
    assert torch.equal(torch.cat([view[name] for name in QKV]), source["attn.in_proj_weight"])
    assert torch.equal(view["attn.k.weight"], source["attn.in_proj_weight"][3:6])
    assert torch.equal(view["projection.weight"], source["projection"].t())
    assert view["mid.to_q.weight"].shape == (4, 4) and view["mid.to_q.bias"] is source["mid.q.bias"]
    assert len(view) == len(list(view)) == 9


def test_there_and_back_is_the_same_model(keymap: KeyMap) -> None:
    source = _side_a()
    back = keymap.view(keymap.view(source), reverse=True)
    assert set(back) == set(source)
    for name, tensor in source.items():
        assert torch.equal(back[name], tensor) and back[name].shape == tensor.shape


@given(names=st.lists(st.text("ab.", min_size=1, max_size=8), unique=True, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_table_of_renames_is_its_own_inverse(names: list[str]) -> None:
    keymap = KeyMap([rename(f"left.{i}", f"right.{i}") for i in range(12)])
    source = {f"left.{i}.{name}": torch.tensor(i) for i, name in enumerate(names)}
    there = keymap.view(source)
    assert set(there) == {name.replace("left", "right", 1) for name in source}
    assert dict(keymap.view(there, reverse=True)) == source


def test_tensors_are_read_only_when_asked_for(keymap: KeyMap) -> None:
    class Guarded(dict):
        def __getitem__(self, name: str) -> torch.Tensor:
            read.append(name)
            return super().__getitem__(name)

    read: list[str] = []
    view = keymap.view(Guarded(_side_a()))
    assert "projection.weight" in view and list(view) and not read
    view["attn.v.weight"]
    assert read == ["attn.in_proj_weight"]


def test_names_without_a_place_and_missing_partners_are_listed(keymap: KeyMap) -> None:
    with pytest.raises(UnmappedKeys) as caught:
        keymap.view({"input_blocks.1.x": torch.ones(1), "unknown.b": torch.ones(1), "unknown.a": torch.ones(1)})
    assert caught.value.unknown == ("unknown.b", "unknown.a") and caught.value.incomplete == ()
    with pytest.raises(UnmappedKeys, match=r"attn\.v\.weight") as caught:
        keymap.view({name: torch.ones(2, 2) for name in QKV[:2]}, reverse=True)
    assert caught.value.incomplete == ("attn.v.weight",)


def test_a_table_with_two_rules_for_a_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="two rules for x"):
        KeyMap([rename("x", "a"), rename("x", "b")])
