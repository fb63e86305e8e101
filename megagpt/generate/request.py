"""What one may ask of a model, and what comes back: values, checked when they are made. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megagpt.errors import require

Finish = Literal["stop", "length", "context", "cancelled"]
"""Why a text ends: an end-of-text token or stop string; n_tokens are there; the context is full; it was given up."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What to make of a prompt.

    n_tokens: to write at most; 0 to score the prompt alone.  n_samples: texts to write, each drawn by itself.
    stop: strings that end a text, and are no part of it.
    slide: where the context is full, go on with its last half; else the text ends there.
    logprobs: None for none; else the log-probability of each token written, and those of so many likeliest ones. Of the
    model as it is, before what follows here.  prompt_logprobs: those of the prompt's tokens too,
    from the one with number first_scored on.

    How a token is drawn: penalties and bias, temperature, top_k, top_p, min_p, in this order; then one is drawn of what
    is left. What is drawn follows from (seed, sample, place in the text) and the probabilities.
    repetition_penalty: logits of all tokens so far, the prompt's too, are divided by it, where negative multiplied
    (Keskar et al. 2019, section 4.1).
    presence_penalty, frequency_penalty: taken off the logit of each token written so far, once, and as often as it was
    written (as OpenAI defines them; the prompt does not count).
    logit_bias: added to the logits of these tokens.
    temperature: divides the logits; 0 takes the likeliest, and nothing is drawn.
    top_k: among the k likeliest; 0: among all.
    top_p: among the likeliest that have this probability together (Holtzman et al. 2020, section 3.1).
    min_p: among those with at least this share of the likeliest one's probability (Nguyen et al. 2024).
    """

    n_tokens: int = 120
    n_samples: int = 1
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop: tuple[str, ...] = ()
    slide: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    first_scored: int = 0

    def __post_init__(self) -> None:
        biases = self.logit_bias.values()
        for name, ok, wanted in (
            ("n_tokens", self.n_tokens >= 0, "0 or more"),
            ("n_samples", self.n_samples >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            ("logit_bias", all(map(math.isfinite, biases)), "numbers"),
            ("seed", 0 <= self.seed < 2**64, "0 to 2^64 - 1"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("first_scored", self.first_scored >= 0, "0 or more"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more"),
        ):
            require(ok, f"got {name}={getattr(self, name)}", f"wanted {wanted}", f"change {name}", name)

    @property
    def only_scores(self) -> bool:
        """Whether nothing is written: then the model need not read the prompt's last token."""
        return self.n_tokens == 0

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn, and no logit is changed."""
        return self.temperature == 0 and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or a bias move logits."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(penalties or self.logit_bias)


@dataclass(frozen=True)
class Request:
    """A prompt, one token at least, and what to make of it.

    ends: tokens that end the text, and are no part of it: the tokenizer's end of text as a rule.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    ends: tuple[int, ...] = ()

    def check(self, vocab_size: int, n_places: int) -> None:
        """Raises UserError where a model of this vocabulary and context cannot take it."""
        require(bool(self.prompt), "got an empty prompt", "wanted a token or more", "give one", "prompt")
        for name, ids in (("prompt", self.prompt), ("logit_bias", self.sampling.logit_bias)):
            strange = [token for token in ids if not 0 <= token < vocab_size]
            got, wanted = f"got token id {strange[:1]} in {name}", f"wanted 0 to {vocab_size - 1}"
            require(not strange, got, wanted, "give ids of the model's own vocabulary", name)
        most = n_places + self.sampling.only_scores
        require(
            len(self.prompt) <= most or self.sampling.slide,
            f"got a prompt of {len(self.prompt)} tokens",
            f"wanted at most {most}, the model's context",
            "shorten it, or let the context slide",
            "prompt",
        )


@dataclass(frozen=True)
class TokenLogprobs:
    """A token, the log-probability that the model gave it, and the likeliest ones in its place, best first.

    logprob: None for the first token of a prompt, which nothing precedes.
    """

    token: int
    logprob: float | None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a step adds to one text.

    request: the number that `Engine.add` gave.  tokens: the new ones; none where the text ends by itself.
    text: what can be shown by now: "" while a character or a stop string may still be on its way, and without a
    tokenizer.  logprobs: of the new tokens, if asked for, and of an end of text, which is none of them.
    prompt: of those of the prompt that the step read, likewise.  finish: where this ends the text.
    """

    request: int
    sample: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None


@dataclass
class Completion:
    """One whole text: the pieces, joined.

    finish: None while it is not ended.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, piece: Piece) -> None:
        """The next piece of this text."""
        self.tokens += piece.tokens
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.prompt_logprobs += piece.prompt
        self.finish = piece.finish or self.finish
