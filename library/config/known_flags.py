"""What sd-scripts' users may bring along: flags that are not there yet, and flags that have nothing to do here.

sd_scripts_flags.json: name -> [letters of the scripts that have it, type, default]. Letters: T full fine-tune,
N network, I textual inversion, L LLLite, C ControlNet, G sdxl_gen_img, g gen_img, cl and ct the cache tools, x only
acts for other model families; other scripts stand with their names.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from library.config.fields import EVERY_RUN, FULL, GENERATOR, LATENTS, SHARED, TEXTS
from library.config.runs import RUNS
from library.errors import Problem

_SCRIPTS = {
    "T": "sdxl_train.py",
    "N": "sdxl_train_network.py",
    "I": "sdxl_train_textual_inversion.py",
    "L": "sdxl_train_control_net_lllite.py",
    "C": "sdxl_train_control_net.py",
    "G": "sdxl_gen_img.py",
    "g": "gen_img.py",
    "cl": "cache_latents.py",
    "ct": "cache_text_encoder_outputs.py",
}

# sd-scripts tests these for truth, so 0 switches them off although their default is empty.
_ZERO_IS_OFF = frozenset(
    {
        "adaptive_noise_scale", "ddp_timeout", "fused_optimizer_groups", "initial_epoch", "initial_step",
        "ip_noise_gamma", "max_validation_steps", "min_snr_gamma", "multires_noise_iterations", "noise_offset",
        "scale_weight_norms", "v_pred_like_loss", "validate_every_n_epochs", "validate_every_n_steps",
    }
)  # fmt: skip

# These say what to do with a configuration and are therefore no part of one.
COMMAND_LINE_ONLY = frozenset({"config_file", "output_config", "print_config"})

# Accepted with a notice: name -> (runs, why there is nothing to do).
NO_EFFECT: dict[str, tuple[frozenset[str], str]] = {
    "tokenizer_cache_dir": (EVERY_RUN, "both tokenizers are part of this suite"),
    "lowram": (SHARED, "models are always loaded without a second copy in memory"),
    "highvram": (SHARED, "the memory cache is never cleared between batches"),
    "skip_existing": (LATENTS | TEXTS, "existing cache files are always kept when they are still right"),
    "cache_info": (SHARED, "sizes and captions are always kept in an index of each image folder"),
    "use_safetensors": (FULL | LATENTS | TEXTS, "safetensors is the only format that is written"),
    "diffusers_xformers": (
        FULL | LATENTS | TEXTS | GENERATOR,
        "it concerns the VAE only; --xformers sets the U-Net's attention",
    ),
    "sdxl": (LATENTS | TEXTS | GENERATOR, "every model here is an SDXL model"),
    "no_preview": (GENERATOR, "no window is ever opened"),
    "clip_skip": (GENERATOR, "SDXL always uses the penultimate layer of its text encoders"),
}


# Refused for good: name -> (why, what to do).
REFUSED: dict[str, tuple[str, str]] = {
    "v1": ("v1 is for Stable Diffusion 1, which is not supported", "remove v1"),
    "v2": ("v2 is for Stable Diffusion 2, which is not supported", "remove v2"),
    "vae_slices": (
        "vae_slices is not supported: the VAE is not cut into slices here",
        "use vae_tiling",
    ),
    "force_scheduler_zero_steps_offset": (
        "force_scheduler_zero_steps_offset is not supported: drawing over a picture begins at the step of its strength",
        "remove it",
    ),
}

# Keys of the dataset file that sd-scripts accepts as flags and does not use.
_DATASET_FILE_ONLY = frozenset({"conditioning_data_dir"})


class KnownFlag(NamedTuple):
    """A flag of sd-scripts: the letters of its scripts, its type, its default."""

    letters: frozenset[str]
    kind: str
    default: Any

    @property
    def scripts(self) -> list[str]:
        """File names of the scripts that have it."""
        return [_SCRIPTS.get(letter, f"{letter}.py") for letter in sorted(self.letters - {"x"})]


@functools.cache
def known_flags() -> dict[str, KnownFlag]:
    """All flags of sd-scripts by name."""
    table = json.loads(Path(__file__).with_name("sd_scripts_flags.json").read_text(encoding="utf-8"))
    return {name: KnownFlag(frozenset(row[0].split()), row[1], row[2]) for name, row in table.items()}


def notice_without_effect(name: str, run: str) -> str | None:
    """Why flag `name` has nothing to do in this run; None when it is not such a flag."""
    runs, reason = NO_EFFECT.get(name, (frozenset[str](), ""))
    return f"{name} has no effect: {reason}" if run in runs else None


def foreign_flag(name: str, value: Any, *, run: str, where: str) -> Problem | None:
    """The problem with a key or flag that this run does not have; None for sd-scripts' flags that ask for nothing.

    `value` is a text from the command line or a TOML value.
    """
    known = known_flags().get(name)
    if known and _asks_for_nothing(name, known, value):
        return None
    if name in COMMAND_LINE_ONLY:
        return Problem(f"{name} only acts on the command line", where, f"remove {name}")
    if name in ("datasets", "subsets"):
        fix = "put the datasets into a file of their own and name it in dataset_config"
        return Problem(f"{name} cannot stand in this file", where, fix)
    if name in _DATASET_FILE_ONLY:
        what = f"{name} is supported in the dataset file only, because it belongs to one folder of images"
        return Problem(what, where, f"set {name} under [[datasets.subsets]] and name the file in dataset_config")
    owners = [other.script for other in RUNS.values() if name in other.options()]
    near = nearest(name, RUNS[run].options())
    suggestion = f"did you mean {near}?" if near else ""
    if owners:
        return Problem(f"{name} is an option of {' and '.join(owners)}, not of {RUNS[run].script}", where, suggestion)
    if known is None:
        return Problem(f"{name} is not an option", where, suggestion or f"see {RUNS[run].script} --help")
    if known.letters == {"x"}:
        return Problem(f"{name} only acts for other model families; SDXL has no use for it", where, f"remove {name}")
    if name in REFUSED:
        what, fix = REFUSED[name]
        return Problem(what, where, fix)
    if not known.letters & RUNS[run].letters:
        what = f"{name} is not supported yet (sd-scripts has it in {', '.join(known.scripts)})"
        return Problem(what, where, suggestion or f"remove {name}")
    return Problem(f"{name} is not supported yet", where, f"remove {name}")


def _asks_for_nothing(name: str, known: KnownFlag, value: Any) -> bool:
    """Whether the value is the flag's default in sd-scripts, or one that switches it off."""
    if value in (None, "None") or (value == "" and known.default is None):
        return True
    if isinstance(value, str) and known.kind in ("int", "float"):
        try:
            value = float(value)
        except ValueError:
            return False
    if known.kind == "flag":
        return value is False
    if isinstance(value, (list, tuple)):
        return len(value) == 0 and known.default is None
    is_zero = isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0
    return value == known.default or (is_zero and name in _ZERO_IS_OFF)


# what people write who come from other programs, where letters alone would suggest something else
_OTHER_WORDS = {
    "alpha": "network_alpha",
    "batch_size": "train_batch_size",
    "dim": "network_dim",
    "epochs": "max_train_epochs",
    "lr": "learning_rate",
    "rank": "network_dim",
    "steps": "max_train_steps",
}


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` is most likely a misspelling of, or another word for."""
    names = list(candidates)
    if _OTHER_WORDS.get(name) in names:
        return _OTHER_WORDS[name]
    found = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=0.7)
    return found[0] if found else None
