"""Captions to the text condition of the U-Net: chunks of 75 tokens, weights, hidden states, pooled vector.

Shape letters: B captions, n chunks per caption, L 77 tokens per chunk, T text positions, D width of both encoders
together (2048), P pooled width (1280). Training joins chunks to 75n + 2 positions; generation keeps every chunk's
begin and end token, 77n. Source: spec conditioning.md §1-3, gen_img.md §5.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.diffusion.conditioning import TextCond, Tokens
from library.models.prompts import BREAK, parse_weighted
from library.models.token_ids import weighted_ids
from library.models.tokenizers import CHUNK, WINDOW, ClipTokenizer, chunked

_LAYER = -2  # hidden states before the last layer, without the final layer norm: what SDXL was trained on


def tokenize(
    tokenizer: ClipTokenizer, captions: Sequence[str], *, max_token_length: int = CHUNK, weighted: bool = False
) -> Tokens:
    """Token ids (B, n, 77) for both encoders, n = max_token_length / 75; what does not fit is cut off.

    With `weighted` the captions' (brackets:1.2) become weights per position, (B, 75n + 2) float32, 1 at begin, end
    and padding; without it brackets are text.
    """
    assert max_token_length % CHUNK == 0 and max_token_length > 0, max_token_length
    num_chunks = max_token_length // CHUNK
    if not weighted:
        all_ids = tokenizer.encode_all(captions)
        return Tokens(
            _windows(all_ids, num_chunks=num_chunks, pad_id=tokenizer.pad_id_1),
            _windows(all_ids, num_chunks=num_chunks, pad_id=tokenizer.pad_id_2),
        )
    pairs = [weighted_ids(tokenizer, caption) for caption in captions]
    weights = torch.ones(len(captions), num_chunks * CHUNK + 2)
    for row, (_, values) in enumerate(pairs):
        kept = values[: num_chunks * CHUNK]
        weights[row, 1 : 1 + len(kept)] = torch.tensor(kept)
    all_ids = [ids for ids, _ in pairs]
    return Tokens(
        _windows(all_ids, num_chunks=num_chunks, pad_id=tokenizer.pad_id_1),
        _windows(all_ids, num_chunks=num_chunks, pad_id=tokenizer.pad_id_2),
        weights,
        weights,
    )


def encode_text(text_encoder_1: nn.Module, text_encoder_2: nn.Module, tokens: Tokens) -> TextCond:
    """Hidden states (B, 75n + 2, D) and pooled vectors (B, P) of captions, in the encoders' dtype.

    The pooled vector is that of the first chunk, at its first end token, and takes no weights; hidden states are
    multiplied by `tokens.weights_*` where given, without restoring their mean (as sd-scripts trains). Gradients flow.
    """
    hidden_1, hidden_2, pooled = _encode_windows(text_encoder_1, text_encoder_2, tokens.ids_1_BnL, tokens.ids_2_BnL)
    hidden_1, hidden_2 = _joined_chunks(hidden_1), _joined_chunks(hidden_2)
    if tokens.weights_1 is not None:
        hidden_1 = hidden_1 * tokens.weights_1.to(hidden_1)[:, :, None]
    if tokens.weights_2 is not None:
        hidden_2 = hidden_2 * tokens.weights_2.to(hidden_2)[:, :, None]
    return TextCond(torch.cat([hidden_1, hidden_2], dim=-1), pooled)


def encode_text_gen(
    text_encoder_1: nn.Module,
    text_encoder_2: nn.Module,
    tokenizer: ClipTokenizer,
    prompts: Sequence[str],
    *,
    max_chunks: int = 1,
    balance: str = "original",
) -> TextCond:
    """Text condition for generation: hidden (B, 77n, D), pooled (B, P), with prompt weights and BREAK.

    n is what the longest of `prompts` needs, at most `max_chunks`; so give a prompt and its negative together, and
    unrelated prompts apart. BREAK goes on in the next chunk. Weights multiply hidden states; then their mean per prompt
    and encoder is restored (`balance` "original"), or the mean of their absolute values ("abs"), or nothing ("none").
    """
    layouts = [_prompt_chunks(tokenizer, prompt) for prompt in prompts]
    num_chunks = max(1, min(max_chunks, max(len(chunks) for chunks in layouts)))
    ids_1, ids_2, weights = [], [], torch.ones(len(prompts), num_chunks, WINDOW)
    for row, chunks in enumerate(layouts):
        chunks = (chunks + [([], [])] * num_chunks)[:num_chunks]
        ids_1.append([chunked(ids, num_chunks=1, pad_id=tokenizer.pad_id_1)[0] for ids, _ in chunks])
        ids_2.append([chunked(ids, num_chunks=1, pad_id=tokenizer.pad_id_2)[0] for ids, _ in chunks])
        for place, (_, values) in enumerate(chunks):
            weights[row, place, 1 : 1 + len(values)] = torch.tensor(values)
    hidden_1, hidden_2, pooled = _encode_windows(
        text_encoder_1, text_encoder_2, torch.tensor(ids_1), torch.tensor(ids_2)
    )
    hidden = [_weighted(each.flatten(1, 2), weights.flatten(1), balance) for each in (hidden_1, hidden_2)]
    return TextCond(torch.cat(hidden, dim=-1), pooled)


def _prompt_chunks(tokenizer: ClipTokenizer, prompt: str) -> list[tuple[list[int], list[float]]]:
    """Ids and weights per chunk of at most 75; BREAK closes a chunk, even an empty one."""
    chunks: list[tuple[list[int], list[float]]] = [([], [])]
    for text, weight in parse_weighted(prompt, breaks=True):
        if text == BREAK:
            chunks.append(([], []))
            continue
        for token in tokenizer.encode(text):
            if len(chunks[-1][0]) == CHUNK:
                chunks.append(([], []))
            chunks[-1][0].append(token)
            chunks[-1][1].append(weight)
    return chunks


def _windows(all_ids: Sequence[Sequence[int]], *, num_chunks: int, pad_id: int) -> Tensor:
    rows = [chunked(ids, num_chunks=num_chunks, pad_id=pad_id) for ids in all_ids]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), num_chunks, WINDOW)


def _encode_windows(
    text_encoder_1: Any, text_encoder_2: Any, ids_1_BnL: Tensor, ids_2_BnL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (B, n, L, width) of both encoders and pooled (B, P); every chunk is a row of its own."""
    num, chunks, _ = ids_1_BnL.shape
    out_1 = text_encoder_1(ids_1_BnL.flatten(0, 1).to(text_encoder_1.device), output_hidden_states=True)
    # transformers pools at the first position that equals config.eos_token_id, which is the real end token here.
    out_2 = text_encoder_2(ids_2_BnL.flatten(0, 1).to(text_encoder_2.device), output_hidden_states=True)
    hidden_1 = out_1.hidden_states[_LAYER].unflatten(0, (num, chunks))
    hidden_2 = out_2.hidden_states[_LAYER].unflatten(0, (num, chunks))
    return hidden_1, hidden_2, out_2.text_embeds.unflatten(0, (num, chunks))[:, 0]


def _joined_chunks(hidden_BnLD: Tensor) -> Tensor:
    """(B, n, 77, width) to (B, 75n + 2, width): first begin token, all captions' tokens, last end position."""
    inner = hidden_BnLD[:, :, 1 : 1 + CHUNK].flatten(1, 2)
    return torch.cat([hidden_BnLD[:, 0, :1], inner, hidden_BnLD[:, -1, -1:]], dim=1)


def _weighted(hidden_BTD: Tensor, weights_BT: Tensor, balance: str) -> Tensor:
    """hidden * weights, scaled so that each row keeps its mean (of absolute values: "abs") over positions and width."""
    weights = weights_BT.to(hidden_BTD.device)
    plain = (weights == 1).all(dim=1)
    if bool(plain.all()):
        return hidden_BTD
    weighted = hidden_BTD.float() * weights[:, :, None]
    if balance == "none":
        return weighted.to(hidden_BTD.dtype)
    measured = [x.abs() if balance == "abs" else x for x in (hidden_BTD.float(), weighted)]
    before, after = (torch.stack([row.mean() for row in x]) for x in measured)  # bits do not depend on other rows
    # A mean of zero (all weights 0) cannot be restored; such a row stays as it is.
    scale = torch.where((after == 0) | plain, torch.ones_like(after), before / after)
    return (weighted * scale[:, None, None]).to(hidden_BTD.dtype)
