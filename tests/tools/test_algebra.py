"""The algebra behind the tools against LAPACK through scipy, and the rules for ranks against hand-made numbers."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.config.block_weights import MERGE_SLOTS, SLOT_NAMES, parse_block_weights, slot_of_block
from networks._algebra import Factors, Retained, clamped, dynamic_rank, factors_of, svd_of_matrix, svd_of_product
from networks._block_weights import block_factor, block_of

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(0, 5))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(SHAPES)
def test_the_values_of_a_product_are_those_of_the_matrix(sizes):
    rows, columns, rank, seed = sizes
    up, down = random(rows, rank, seed=seed), random(rank, columns, seed=seed + 1)
    u, s, vh = svd_of_product(up, down)
    assert len(s) == min(sizes[:3])
    wanted = scipy.linalg.svdvals((up @ down).numpy())
    assert np.allclose(s.numpy(), wanted[: len(s)], atol=1e-10)
    assert torch.allclose(u * s @ vh, up @ down, atol=1e-10)


@given(SHAPES)
def test_factors_are_the_best_of_their_rank_and_wider_ones_are_filled(sizes):
    rows, columns, rank, seed = sizes
    matrix = random(rows, columns, seed=seed)
    values = scipy.linalg.svdvals(matrix.numpy())
    limit = min(rows, columns)
    for wanted in {1, min(rank, limit), limit}:
        up, down = factors_of(svd_of_matrix(matrix, wanted), wanted)
        assert up.shape == (rows, wanted) and down.shape == (wanted, columns)
        assert float((up @ down - matrix).square().sum()) == pytest.approx(np.sum(values[wanted:] ** 2), abs=1e-9)
    up, down = factors_of(svd_of_matrix(matrix, 1), limit)
    assert up.shape == (rows, limit)
    assert float((up @ down - matrix).square().sum()) == pytest.approx(np.sum(values[1:] ** 2), abs=1e-9)
    assert torch.allclose(down @ down.T, torch.eye(limit, dtype=torch.float64), atol=1e-9)


def test_the_randomised_method_is_close_to_the_exact_one():
    left, _ = torch.linalg.qr(random(120, 80))
    right, _ = torch.linalg.qr(random(90, 80, seed=1))
    values = 0.8 ** torch.arange(80, dtype=torch.float64)
    matrix = (left * values) @ right.T
    u, s, vh = svd_of_matrix(matrix, 8, iterations=2)
    assert torch.allclose(s, values[:8], rtol=1e-6)
    best = float(values[8:].square().sum())
    assert float((u * s @ vh - matrix).square().sum()) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "param", "rank"),
    [
        # 8, 4, 2, 1, 0.5: sums 8, 12, 14, 15, 15.5; squares 64, 80, 84, 85, 85.25
        ("sv_ratio", 1.5, 2),  # 8 alone is above 8 / 1.5
        ("sv_ratio", 4.0, 3),  # 8 and 4 are above 2, 2 is not
        ("sv_ratio", 4.1, 4),
        ("sv_ratio", 100.0, 5),  # all 5, held at 4, plus 1
        ("sv_cumulative", 0.5, 2),  # 8 of 15.5 are enough
        ("sv_cumulative", 0.52, 3),
        ("sv_cumulative", 0.9, 4),  # 14 of 15.5
        ("sv_cumulative", 1.0, 5),
        ("sv_fro", 0.8, 2),  # 0.64 of the squares: 64 of 85.25 are enough
        ("sv_fro", 0.9, 3),
        ("sv_fro", 0.99, 4),  # 0.9801: 84 of 85.25
        ("sv_fro", 1.0, 5),
    ],
)
def test_dynamic_rules(method, param, rank):
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])
    found = dynamic_rank(values, num_values=5, method=method, param=param, cap=99)
    assert found == rank
    assert dynamic_rank(values, num_values=5, method=method, param=param, cap=2) == 2


def test_dynamic_rules_at_the_edges():
    fours = torch.tensor([4.0, 2.0, 1.0, 1.0])
    for method, param, rank in (
        ("sv_ratio", 1.0, 2),  # none is above the largest: held at 1, plus 1
        ("sv_cumulative", 0.5, 2),  # 4 of 8 are just enough
        ("sv_cumulative", 0.75, 3),
    ):
        assert dynamic_rank(fours, num_values=4, method=method, param=param, cap=9) == rank
    assert dynamic_rank(torch.tensor([1e-7, 0.0]), num_values=9, method="sv_fro", param=0.9, cap=8) == 1
    one = torch.tensor([3.0])
    assert dynamic_rank(one, num_values=40, method="sv_fro", param=0.5, cap=8) == 2  # never below 2
    assert dynamic_rank(one, num_values=1, method="sv_ratio", param=5, cap=8) == 1
    kept = Retained.of(torch.tensor([3.0, 4.0][::-1]), 1)
    assert (kept.sum, kept.frobenius, kept.ratio) == (pytest.approx(4 / 7), pytest.approx(0.8), 1.0)


@given(st.floats(0.05, 1.0))
def test_clamping_is_at_numpys_quantile(quantile):
    factors = Factors(random(7, 3), random(3, 5, seed=1))
    values = np.concatenate([factor.numpy().ravel() for factor in factors])
    limit = np.inf if quantile == 1 else np.quantile(values, quantile)
    for found, before in zip(clamped(factors, quantile), factors, strict=True):
        assert torch.allclose(found, before.clamp(-limit, limit), atol=1e-12)


def test_slots_of_names():
    wanted = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": "BASE",
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj": "BASE",
        "lora_unet_time_embed_0": "IN00",
        "lora_unet_label_emb_0_2": "IN00",
        "lora_unet_input_blocks_0_0": "IN00",
        "lora_unet_input_blocks_4_1_proj_in": "IN04",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": "IN08",
        "lora_unet_middle_block_1_proj_out": "MID",
        "lora_unet_output_blocks_0_1_proj_in": "OUT00",
        "lora_unet_output_blocks_5_2_conv": "OUT05",
        "lora_unet_out_2": "OUT09",
    }
    assert {name: SLOT_NAMES[slot_of_block(block_of(name))] for name in wanted} == wanted
    lists = {length: [SLOT_NAMES[place] for place in places] for length, places in MERGE_SLOTS.items()}
    assert lists[12] == [
        "BASE",
        "IN04",
        "IN05",
        "IN07",
        "IN08",
        "MID",
        "OUT00",
        "OUT01",
        "OUT02",
        "OUT03",
        "OUT04",
        "OUT05",
    ]
    assert lists[17][:8] == ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"] and lists[17][8:] == list(
        SLOT_NAMES[17:]
    )
    assert lists[20] == [*SLOT_NAMES[:10], "MID", *SLOT_NAMES[14:23]]
    assert all(len(places) == length for length, places in MERGE_SLOTS.items())


def test_what_a_list_does_not_name_has_weight_one():
    weights = parse_block_weights("[0,0,0,0,0,0,0,0,0,0,0,0]", MERGE_SLOTS)
    assert block_factor("lora_unet_input_blocks_4_1_proj_in", weights) == 0
    assert block_factor("lora_unet_input_blocks_1_0_in_layers_2", weights) == 1
    assert block_factor("lora_unet_input_blocks_4_1_proj_in", ()) == 1


@pytest.mark.parametrize("text", ["[1,2]", "one", '["a"]', "[1," * 12, "[true" + ",1" * 11 + "]"])
def test_lists_that_cannot_be_read(text):
    with pytest.raises(ValueError):
        parse_block_weights(text, MERGE_SLOTS)
