"""Options about new words of the prompt: textual inversion, and tokens that train together with a network."""

from __future__ import annotations

from typing import ClassVar

from library.config.fields import NETWORK, TOKENS, Group, option


class TokenOptions(Group):
    """Which words are new, what they mean at first, and what they are trained with."""

    title: ClassVar[str] = "tokens"
    acts: ClassVar[frozenset[str]] = TOKENS | NETWORK

    token_string: str | None = option(None, "the new word; captions and prompts use it like any other")
    num_vectors_per_token: int = option(
        1, "vectors behind the word, in each text encoder (unset: 1, or those of `weights`)", ge=1
    )
    init_word: str | None = option(
        None,
        "what the vectors are at first: those of these words, repeated where there are too few, or of an embedding "
        "file (unset: random, as long as vectors are on average)",
    )
    weights: str | None = option(
        None, "embedding file to go on from; it has as many vectors as num_vectors_per_token says", path=True
    )
    token_file: str | None = option(
        None,
        "TOML file with several tokens: a table [tokens.NAME] for each, with the keys init_word, weights and "
        "num_vectors_per_token",
        path=True,
    )
    use_object_template: bool = option(False, "train with sentences about an object instead of the captions")
    use_style_template: bool = option(False, "train with sentences about a style instead of the captions")
    token_template_file: str | None = option(
        None, "train with your own sentences instead of the captions: one a line, {} stands for the token", path=True
    )
    token_norm_decay: float = option(
        0.0,
        "after each step, move the length of each vector this share of the way to the mean length of the vocabulary's "
        "(1: keep it there)",
        ge=0,
        le=1,
    )


class PivotalOptions(Group):
    """Tokens that are trained together with a network."""

    title: ClassVar[str] = "tokens beside a network"
    acts: ClassVar[frozenset[str]] = NETWORK

    train_tokens: bool = option(False, "train new tokens together with the network (pivotal tuning)")
    token_lr: float | None = option(None, "learning rate of the tokens (unset: learning_rate)", ge=0)
    bundle_tokens: bool = option(
        False, "also put the tokens into the network's file, where generation and A1111 find them"
    )
