"""Text encoder names: single file (CLIP-L in transformers' old names, bigG in OpenCLIP's) <-> transformers.

transformers 5 names the modules of `CLIPTextModel` without the "text_model." that files, LoRA keys and
`CLIPTextModelWithProjection` have.
"""

from functools import cache

from library.io.keymap import KeyMap, rename, split, transpose

TEXT_MODEL = "text_model."
_LAYER = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)
_CLIP_L = ("embeddings", "encoder", "final_layer_norm")


def with_text_model(name: str) -> str:
    """The module path or key with its "text_model." in front, as files and LoRA keys have it.

    `text_projection` stands beside the text model and stays as it is.
    """
    return name if name.startswith((TEXT_MODEL, "text_projection")) else TEXT_MODEL + name


@cache
def clip_l_keymap() -> KeyMap:
    """Layout A is the single file below `conditioner.embedders.0.transformer.`, layout B is transformers."""
    return KeyMap([rename(TEXT_MODEL + name, name) for name in _CLIP_L])


@cache
def big_g_keymap(num_layers: int, *, linear_projection: bool = False) -> KeyMap:
    """Layout A is the single file below `conditioner.embedders.1.model.`, layout B is transformers.

    OpenCLIP multiplies x @ P where a linear layer computes x @ W.T, so the projection is transposed. Playground's
    files hold the layer's weight instead, as `text_projection.weight`: `linear_projection` reads those.
    """
    rules = [
        rename("token_embedding", "text_model.embeddings.token_embedding"),
        rename("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        rename("ln_final", "text_model.final_layer_norm"),
        rename("text_projection.weight", "text_projection.weight")
        if linear_projection
        else transpose("text_projection", "text_projection.weight"),
    ]
    for layer in range(num_layers):
        theirs, ours = f"transformer.resblocks.{layer}.", f"text_model.encoder.layers.{layer}."
        rules += [rename(theirs + a, ours + b) for a, b in _LAYER]
        for kind in ("weight", "bias"):
            parts = [f"{ours}self_attn.{name}_proj.{kind}" for name in ("q", "k", "v")]
            rules.append(split(f"{theirs}attn.in_proj_{kind}", parts))
    return KeyMap(rules)
