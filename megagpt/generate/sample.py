"""Text from a trained model, one token at a time.

Shapes: T tokens so far, V the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megagpt.errors import UserError
from megagpt.generate.trained import Trained
from megagpt.parallel.embedding import gather_logits


@torch.no_grad()
def generate(
    trained: Trained, prompt: list[int], *, n_tokens: int, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> Iterator[int]:
    """Yield n_tokens new tokens, fewer where the tokenizer's end of text comes.

    temperature 0 takes the likeliest token each time; otherwise one of the top_k likeliest (0: all) is drawn.
    The model sees at most its seq_len last tokens. Equal on every rank of the model axis: all draw with one seed.
    """
    config, end = trained.config.model, trained.tokenizer.eod if trained.tokenizer else None
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(n_tokens):
        window_1T = torch.tensor([tokens[-config.seq_len :]], device=trained.device)
        logits_1V = gather_logits(trained.model(window_1T)[:, -1:], config.vocab, trained.mesh.model)[:, 0]
        token = _choose(logits_1V[0].float().cpu(), temperature, top_k, generator)
        if token == end:
            return
        tokens.append(token)
        yield token


def complete(trained: Trained, prompt: str, **settings: float) -> str:
    """The prompt and what the model makes of it, as text."""
    tokenizer = trained.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{trained.folder} does not record a tokenizer, so that it cannot write text; it was trained on token ids"
        )
    start = tokenizer.encode(prompt) or ([] if tokenizer.eod is None else [tokenizer.eod])
    if not start:
        raise UserError("got an empty prompt, and the tokenizer has no end-of-text token to begin with; give --prompt")
    return prompt + tokenizer.decode(list(generate(trained, start, **settings)))  # type: ignore[arg-type]


def _choose(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits_V.argmax())
    if 0 < top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
