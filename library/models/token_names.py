"""Whether words can be new tokens: CLIP's vocabulary must not have them. Needs no torch."""

from __future__ import annotations

from library.config.run_config import RunConfig
from library.config.token_table import token_specs, trains_tokens
from library.errors import Problem, UserError
from library.models.tokenizers import is_one_token


def problems_in(cfg: RunConfig) -> list[Problem]:
    """A problem for every token of a run that already means something."""
    if not trains_tokens(cfg):
        return []
    try:
        specs = token_specs(cfg)
    except UserError:
        return []  # the rules report it
    return [
        Problem(
            f"the token {spec.name} is already in the vocabulary of the text encoders",
            spec.where,
            f"choose a word that means nothing yet, such as {spec.name}_x or <{spec.name}>",
        )
        for spec in specs
        if spec.name and is_one_token(spec.name)
    ]
