"""The four models of the tiny SDXL: diffusers and transformers configurations, tokenizer, sizes.

Every width differs on purpose (32 / 48 / 80, 64 / 80), so that swapped encoders or a wrong order of
concatenation crash instead of passing. Heavy libraries are imported inside the functions.
"""

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from library.models.tiny.unpack import generated_table

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTokenizer

SCALING_FACTOR = 0.13025
BOS, EOS = 49406, 49407
PAD1, PAD2 = EOS, 0  # SDXL pads the first encoder with the end token and the second with id 0
NUM_TOKENS = 77
VOCAB_SIZE = 49408
HEAD_DIM = 16
NORM_GROUPS = 8  # with 32 channels, SDXL's 32 groups would erase the mean colour of each channel
TABLE_SEEDS = {"te1": 101, "te2": 102}
TABLE_STD = 0.3
TABLE_KEYS = {
    "te1": "embeddings.token_embedding.weight",
    "te2": "text_model.embeddings.token_embedding.weight",
}
VOCABULARY_FILE = Path(__file__).parents[2] / "library" / "models" / "tokenizer_data" / "bpe_simple_vocab_16e6.txt.gz"

UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64, 80],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 5],  # the number of heads, as in diffusers' own SDXL configuration
    "cross_attention_dim": 80,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 48 + 6 * 32,
    "use_linear_projection": True,
    "norm_num_groups": NORM_GROUPS,
}
VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [16, 32, 48, 48],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": NORM_GROUPS,
    "sample_size": 128,
    "scaling_factor": SCALING_FACTOR,
}
TE1_CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": NUM_TOKENS,
    "projection_dim": 32,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD1,
}
TE2_CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "hidden_act": "gelu",
    "max_position_embeddings": NUM_TOKENS,
    "projection_dim": 48,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD2,
}
CONFIGS = {"unet": UNET_CONFIG, "vae": VAE_CONFIG, "te1": TE1_CONFIG, "te2": TE2_CONFIG}


def build_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET_CONFIG)


def build_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE_CONFIG)


def build_text_encoders(token_ids: np.ndarray | None = None):
    """Both text encoders; with `token_ids` their tables hold only these rows (ids are then positions in it)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    models = []
    for kind, config in ((CLIPTextModel, TE1_CONFIG), (CLIPTextModelWithProjection, TE2_CONFIG)):
        config = dict(config)
        if token_ids is not None:
            position = {int(token): row for row, token in enumerate(token_ids)}
            config["vocab_size"] = len(token_ids)
            # Pooling looks for the end token by its id, so the ids move along with the rows.
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                config[name] = position[config[name]]
        models.append(kind(CLIPTextConfig(**config)))
    return models


def token_table(encoder: str, width: int) -> np.ndarray:
    """The generated token table of "te1" or "te2", float16 (49408, width): untrained rows are exactly these."""
    return generated_table(TABLE_SEEDS[encoder], VOCAB_SIZE, width, TABLE_STD)


def load_tokenizer() -> "CLIPTokenizer":
    """CLIP's tokenizer from the bundled merges."""
    from transformers import CLIPTokenizer

    lines = gzip.decompress(VOCABULARY_FILE.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1:48895]]
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]  # printable bytes stand for themselves
    moved = [byte for byte in range(256) if byte not in kept]
    letters = [chr(byte) for byte in kept] + [chr(256 + n) for n in range(len(moved))]
    words = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=NUM_TOKENS)


def tokenize(tokenizer: "CLIPTokenizer", captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids for both encoders, int64 (B, 77) each: they differ only in the padding."""
    rows1 = np.full((len(captions), NUM_TOKENS), PAD1, np.int64)
    rows2 = np.full((len(captions), NUM_TOKENS), PAD2, np.int64)
    for row, ids in enumerate(tokenizer(captions, truncation=True, max_length=NUM_TOKENS)["input_ids"]):
        rows1[row, : len(ids)] = ids
        rows2[row, : len(ids)] = ids
    return rows1, rows2


def used_token_ids(tokenizer: "CLIPTokenizer", words: tuple[str, ...]) -> np.ndarray:
    """Sorted ids of every token that the words, the frame and the padding need, int64 (R,)."""
    ids = {BOS, EOS, PAD1, PAD2}
    for word in words:
        ids.update(tokenizer(word)["input_ids"])
    return np.array(sorted(ids), np.int64)


def encode_text(te1, te2, ids1: "torch.Tensor", ids2: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """SDXL's text condition: hidden states (B, 77, 80) and pooled (B, 48)."""
    import torch

    hidden1 = te1(input_ids=ids1, output_hidden_states=True).hidden_states[-2]
    out2 = te2(input_ids=ids2, output_hidden_states=True)
    return torch.cat([hidden1, out2.hidden_states[-2]], dim=-1), out2.text_embeds


def predict(unet, x, t, hidden, pooled, sizes):
    """The U-Net's prediction of the noise, (B, 4, h, w)."""
    added = {"text_embeds": pooled, "time_ids": sizes}
    return unet(x, t, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
