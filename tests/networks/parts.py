"""SDXL-shaped models of any size, and the naming rules that a training run hands to networks."""

import torch

from networks._keys import AdapterRoot


def sai_name(path: str) -> str:
    """Module path of diffusers' U-Net -> SAI path, written from model_files.md §4 apart from the library's table."""
    head, _, rest = path.partition(".")
    numbers = [int(piece) for piece in path.split(".") if piece.isdigit()]
    if head == "mid_block":
        kind, index, *tail = rest.split(".")
        slot = 1 if kind == "attentions" else 2 * int(index)
        return ".".join([f"middle_block.{slot}", *resnet_part(tail)])
    if head in ("down_blocks", "up_blocks"):
        _block, kind, index, *tail = rest.split(".")
        i, j = numbers[:2]
        if kind == "downsamplers":
            return f"input_blocks.{3 * (i + 1)}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{3 * i + 2}.2.conv"
        slot = 1 if kind == "attentions" else 0
        block_name = f"input_blocks.{3 * i + j + 1}" if head == "down_blocks" else f"output_blocks.{3 * i + j}"
        return ".".join([f"{block_name}.{slot}", *resnet_part(tail)])
    table = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    table |= {f"time_embedding.linear_{n}": f"time_embed.{2 * n - 2}" for n in (1, 2)}
    table |= {f"add_embedding.linear_{n}": f"label_emb.0.{2 * n - 2}" for n in (1, 2)}
    return table[path]


def resnet_part(tail: list[str]) -> list[str]:
    table = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    return [table.get(piece, piece) for piece in tail]


def te1_name(path: str) -> str:
    return path if path.startswith("text_model.") else "text_model." + path


FULL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_UNET = {
    "block_out_channels": (32, 64, 80),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 5),
    "cross_attention_dim": 80,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 48 + 6 * 32,
    "norm_num_groups": 8,
}


def make_unet(**sizes):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        use_linear_projection=True,
        **sizes,
    ).eval()


def make_text_encoders(width1: int, width2: int, *, layers: tuple[int, int], heads: tuple[int, int], vocab: int):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shared = {"vocab_size": vocab, "bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "max_position_embeddings": 77}
    made = []
    for kind, width, n, h in zip(
        (CLIPTextModel, CLIPTextModelWithProjection), (width1, width2), layers, heads, strict=True
    ):
        sizes = {"hidden_size": width, "num_hidden_layers": n, "num_attention_heads": h, "intermediate_size": 4 * width}
        made.append(kind(CLIPTextConfig(**sizes, projection_dim=width, **shared)).eval())
    return made


def make_roots(unet, te1=None, te2=None) -> list[AdapterRoot]:
    roots = [AdapterRoot("unet", "lora_unet", unet, sai_name)]
    if te1 is not None:
        last = len(te1.encoder.layers) - 1
        roots.insert(0, AdapterRoot("te1", "lora_te1", te1, te1_name, (f"encoder.layers.{last}",)))
    if te2 is not None:
        roots.insert(1, AdapterRoot("te2", "lora_te2", te2))
    return roots


def unet_inputs(batch: int = 2, seed: int = 0) -> dict[str, object]:
    g = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=g),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 7, 80, generator=g),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 48, generator=g),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(batch, 6),
        },
    }


def filled(network, seed: int = 3, size: float = 0.2):
    """Give the up weights values, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in network.adapters.values():
            adapter.lora_up.weight.copy_(torch.randn(adapter.lora_up.weight.shape, generator=g) * size)
    return network


def predict(unet, inputs):
    with torch.no_grad():
        return unet(**inputs).sample
