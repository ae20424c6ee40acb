"""Text conditions: layers, pooling, chunks, weights; against the encoders called by hand."""

import pytest
import torch

from library.diffusion.conditioning import Tokens
from library.models.bundle import ModelBundle
from library.models.families import sdxl
from library.models.token_ids import weighted_ids

BOS, EOS = 49406, 49407
SHORT, LONG = "a red circle on a blue background", "a small green star, " * 20  # 100 tokens


def _encode(bundle: ModelBundle, tokens: Tokens):
    return sdxl.encode_text(bundle.text_encoder_1, bundle.text_encoder_2, tokens)


def _tokenize(bundle: ModelBundle, *captions: str, **options) -> Tokens:
    return sdxl.tokenize(bundle.tokenizer, list(captions), **options)


def _generate(bundle: ModelBundle, *prompts: str, **how):
    return sdxl.encode_text_gen(bundle.text_encoder_1, bundle.text_encoder_2, bundle.tokenizer, list(prompts), **how)


def test_tokens_have_a_chunk_dimension_and_each_encoders_padding(bundle: ModelBundle):
    tokens = _tokenize(bundle, "a red circle", "")
    assert tokens.ids_1_BnL.shape == (2, 1, 77) and tokens.ids_1_BnL.dtype == torch.int64
    assert tokens.ids_1_BnL[0, 0].tolist() == [BOS, 320, 736, 7117] + [EOS] * 73
    assert tokens.ids_2_BnL[0, 0].tolist() == [BOS, 320, 736, 7117, EOS] + [0] * 72
    assert tokens.ids_2_BnL[1, 0].tolist() == [BOS, EOS] + [0] * 75
    assert tokens.weights_1 is None and tokens.weights_2 is None
    assert _tokenize(bundle, LONG, max_token_length=225).ids_2_BnL.shape == (1, 3, 77)


def test_an_empty_list_of_captions_has_no_rows(bundle: ModelBundle):
    assert _tokenize(bundle, max_token_length=150).ids_1_BnL.shape == (0, 2, 77)


@torch.no_grad()
def test_hidden_states_are_those_before_the_last_layer_without_its_norm(bundle: ModelBundle):
    tokens = _tokenize(bundle, SHORT)
    text = _encode(bundle, tokens)
    encoder = bundle.text_encoder_1
    after_two_layers = encoder(tokens.ids_1_BnL[:, 0], output_hidden_states=True).hidden_states[2]  # of 0..3
    assert torch.equal(text.hidden_BTD[..., :32], after_two_layers)
    assert text.hidden_BTD.shape == (1, 77, 80) and text.pooled_BP.shape == (1, 48)


@torch.no_grad()
def test_the_pooled_vector_is_projected_from_the_first_end_token(bundle: ModelBundle):
    tokens = _tokenize(bundle, "a red circle")
    encoder = bundle.text_encoder_2
    last = encoder.text_model(tokens.ids_2_BnL[:, 0]).last_hidden_state
    expected = last[:, 4] @ encoder.text_projection.weight.T
    torch.testing.assert_close(_encode(bundle, tokens).pooled_BP, expected, rtol=1e-5, atol=1e-5)


def test_a_token_id_above_the_end_token_does_not_move_the_pooling(bundle: ModelBundle):
    """Textual inversion adds ids from 49408 on; pooling at the largest id would land on them."""
    tokens = _tokenize(bundle, "a red circle")
    table = bundle.text_encoder_2.text_model.embeddings.token_embedding
    wider = torch.nn.Embedding.from_pretrained(torch.cat([table.weight, table.weight[736:737]]))
    bundle.text_encoder_2.text_model.embeddings.token_embedding = wider
    try:
        ids = tokens.ids_2_BnL.clone()
        ids[0, 0, 2] = 49408  # a new word with the vector of "red"
        changed = _encode(bundle, Tokens(tokens.ids_1_BnL, ids))
        assert torch.equal(changed.pooled_BP, _encode(bundle, tokens).pooled_BP)
    finally:
        bundle.text_encoder_2.text_model.embeddings.token_embedding = table


@torch.no_grad()
def test_chunks_are_encoded_apart_and_joined(bundle: ModelBundle):
    tokens = _tokenize(bundle, LONG, max_token_length=150)
    text = _encode(bundle, tokens)
    assert text.hidden_BTD.shape == (1, 152, 80)
    chunks = [_encode(bundle, Tokens(tokens.ids_1_BnL[:, i : i + 1], tokens.ids_2_BnL[:, i : i + 1])) for i in (0, 1)]
    first, second = (chunk.hidden_BTD for chunk in chunks)
    expected = torch.cat([first[:, :1], first[:, 1:76], second[:, 1:76], second[:, 76:]], dim=1)
    torch.testing.assert_close(text.hidden_BTD, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.pooled_BP, chunks[0].pooled_BP, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_captions_do_not_depend_on_their_batch(bundle: ModelBundle):
    together = _encode(bundle, _tokenize(bundle, SHORT, LONG, max_token_length=150))
    alone = _encode(bundle, _tokenize(bundle, LONG, max_token_length=150))
    torch.testing.assert_close(together.hidden_BTD[1:], alone.hidden_BTD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.pooled_BP[1:], alone.pooled_BP, rtol=1e-5, atol=1e-5)


class TestWeights:
    def test_weights_follow_their_tokens(self, bundle: ModelBundle):
        ids, weights = weighted_ids(bundle.tokenizer, "a (red:1.5) [circle]")
        assert ids == [320, 736, 7117] and weights == pytest.approx([1, 1.5, 1 / 1.1])
        tokens = _tokenize(bundle, "a (red:1.5) circle", "cat", weighted=True)
        assert tokens.weights_1.shape == (2, 77) and tokens.weights_1.dtype == torch.float32
        assert tokens.weights_1[0].tolist() == [1, 1, 1.5, 1] + [1] * 73
        assert tokens.weights_2[1].tolist() == [1] * 77
        assert torch.equal(tokens.ids_1_BnL, _tokenize(bundle, "a red circle", "cat").ids_1_BnL)

    def test_weights_reach_into_later_chunks(self, bundle: ModelBundle):
        tokens = _tokenize(bundle, "cat " * 80 + "(red:2)", max_token_length=150, weighted=True)
        assert tokens.weights_1.shape == (1, 152)
        assert torch.nonzero(tokens.weights_1[0] != 1).flatten().tolist() == [81]
        assert tokens.ids_1_BnL[0, 1, 6] == 736  # the same place: 75 + 6 = 81

    def test_what_is_cut_off_has_no_weight(self, bundle: ModelBundle):
        tokens = _tokenize(bundle, "cat " * 75 + "(red:2)", weighted=True)
        assert tokens.weights_1[0].tolist() == [1] * 77

    @torch.no_grad()
    def test_training_multiplies_hidden_states_only(self, bundle: ModelBundle):
        plain = _encode(bundle, _tokenize(bundle, "a red circle"))
        text = _encode(bundle, _tokenize(bundle, "a (red:1.5) circle", weighted=True))
        expected = plain.hidden_BTD.clone()
        expected[:, 2] *= 1.5
        torch.testing.assert_close(text.hidden_BTD, expected)
        assert torch.equal(text.pooled_BP, plain.pooled_BP)

    def test_brackets_are_text_unless_weighted(self, bundle: ModelBundle):
        tokens = _tokenize(bundle, "a (red:1.5) circle")
        assert tokens.ids_1_BnL[0, 0, 2] != 736 and tokens.weights_1 is None


class TestGeneration:
    @torch.no_grad()
    def test_each_chunk_keeps_its_begin_and_end(self, bundle: ModelBundle):
        text = _generate(bundle, LONG, max_chunks=3)
        assert text.hidden_BTD.shape == (1, 154, 80)
        tokens = _tokenize(bundle, LONG, max_token_length=150)
        second = _encode(bundle, Tokens(tokens.ids_1_BnL[:, 1:], tokens.ids_2_BnL[:, 1:]))
        torch.testing.assert_close(text.hidden_BTD[:, 77:], second.hidden_BTD, rtol=1e-5, atol=1e-5)

    def test_all_prompts_get_the_chunks_of_the_longest_up_to_the_limit(self, bundle: ModelBundle):
        assert _generate(bundle, SHORT, max_chunks=3).hidden_BTD.shape[1] == 77
        assert _generate(bundle, LONG, "", max_chunks=3).hidden_BTD.shape == (2, 154, 80)
        assert _generate(bundle, LONG * 5, max_chunks=3).hidden_BTD.shape[1] == 3 * 77
        assert _generate(bundle, LONG).hidden_BTD.shape[1] == 77

    @torch.no_grad()
    def test_the_mean_is_restored_per_prompt_and_encoder(self, bundle: ModelBundle):
        plain, weighted = _generate(bundle, "a red circle"), _generate(bundle, "a (red:1.8) circle")
        for part in (slice(0, 32), slice(32, 80)):
            before, after = plain.hidden_BTD[..., part], weighted.hidden_BTD[..., part]
            assert after.mean().item() == pytest.approx(before.mean().item(), rel=1e-3, abs=1e-5)
            by_hand = before.clone()
            by_hand[:, 2] *= 1.8
            torch.testing.assert_close(after, by_hand * before.mean() / by_hand.mean(), rtol=1e-3, atol=1e-4)
        assert torch.equal(weighted.pooled_BP, plain.pooled_BP)

    @torch.no_grad()
    def test_weights_may_keep_the_mean_of_absolute_values_or_nothing(self, bundle: ModelBundle):
        plain = _generate(bundle, "a red circle").hidden_BTD
        by_hand = plain.clone()
        by_hand[:, 2] *= 1.8
        free = _generate(bundle, "a (red:1.8) circle", balance="none")
        torch.testing.assert_close(free.hidden_BTD, by_hand, rtol=1e-5, atol=1e-5)
        kept = _generate(bundle, "a (red:1.8) circle", balance="abs")
        for part in (slice(0, 32), slice(32, 80)):
            ratio = plain[..., part].abs().mean() / by_hand[..., part].abs().mean()
            assert ratio < 0.99
            torch.testing.assert_close(kept.hidden_BTD[..., part], by_hand[..., part] * ratio, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_a_plain_prompt_beside_a_weighted_one_stays_as_it_is(self, bundle: ModelBundle):
        both, alone = _generate(bundle, "a (red:1.8) circle", "a star"), _generate(bundle, "a star")
        torch.testing.assert_close(both.hidden_BTD[1:], alone.hidden_BTD, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_weights_of_zero_give_numbers(self, bundle: ModelBundle):
        assert torch.isfinite(_generate(bundle, "(a red circle:0)").hidden_BTD).all()

    @torch.no_grad()
    def test_break_goes_on_in_the_next_chunk(self, bundle: ModelBundle):
        broken = _generate(bundle, "a red circle BREAK a star", max_chunks=3)
        assert broken.hidden_BTD.shape[1] == 154
        first, second = _generate(bundle, "a red circle"), _generate(bundle, "a star")
        torch.testing.assert_close(broken.hidden_BTD[:, :77], first.hidden_BTD, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(broken.hidden_BTD[:, 77:], second.hidden_BTD, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(broken.pooled_BP, first.pooled_BP, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_into_both_encoders(fresh_bundle: ModelBundle, checkpointing: bool):
    from library.models import memory

    encoders = (fresh_bundle.text_encoder_1, fresh_bundle.text_encoder_2)
    for encoder in encoders:
        encoder.requires_grad_(True).train()
    if checkpointing:
        memory.enable_gradient_checkpointing(fresh_bundle, text_encoders=True)
    text = _encode(fresh_bundle, _tokenize(fresh_bundle, LONG, SHORT, max_token_length=150))
    (text.hidden_BTD.square().mean() + text.pooled_BP.square().mean()).backward()
    first = [encoder.get_input_embeddings().weight.grad for encoder in encoders]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in first)
    last_layer = fresh_bundle.text_encoder_2.text_model.encoder.layers[2].mlp.fc1.weight.grad
    assert last_layer.abs().sum() > 0  # through the pooled vector
    assert fresh_bundle.text_encoder_1.encoder.layers[2].mlp.fc1.weight.grad is None  # nothing uses it
    assert [encoder.is_activation_checkpointing for encoder in encoders] == [checkpointing] * 2
