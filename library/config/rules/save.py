"""Rules about saving."""

from __future__ import annotations

from library.config.fields import FULL, LLLITE, NETWORK, TOKENS
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("output_dir")
def output_is_named(cfg: RunConfig) -> list[Problem]:
    """A training run has to put its result somewhere."""
    if cfg.save.output_dir:
        return []
    return [Problem("output_dir is missing", fix="name the folder for the trained model")]


@rule("save_model_as", runs=NETWORK | FULL | LLLITE)
def only_embeddings_are_pickles(cfg: RunConfig) -> list[Problem]:
    """A pickle file can run code when it is opened; older programs want their embeddings so."""
    if cfg.save.save_model_as != "pt":
        return []
    what = "save_model_as pt would be a pickle file, which can run code when opened; only embeddings are written so"
    return conflict(cfg, what, "save_model_as", fix="set save_model_as to safetensors")


@rule("save_model_as", runs=NETWORK | TOKENS | LLLITE)
def small_files_have_no_folder(cfg: RunConfig) -> list[Problem]:
    """Networks and embeddings have no diffusers folder."""
    if cfg.save.save_model_as not in ("diffusers", "diffusers_safetensors"):
        return []
    what = "an embedding" if cfg.run in TOKENS else "a network"
    return conflict(cfg, f"{what} is saved as a single file", "save_model_as", fix="set save_model_as to safetensors")
