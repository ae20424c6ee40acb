"""Which networks of the generator act in parts of a picture."""

from __future__ import annotations

from library.config.run_config import RunConfig


def num_regional(cfg: RunConfig) -> int:
    """How many networks act in parts of the picture: with a mask all that are not merged, as in sd-scripts."""
    options = cfg.generate
    if not cfg.img2img.mask_path or options.network_merge:
        return 0
    return max(0, len(options.network_weights) - (options.network_merge_n_models or 0))
