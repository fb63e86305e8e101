"""Drawing a token from logits. What is drawn follows from (seed, sample, place) and the probabilities, nothing else.

Shapes: V the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megagpt.generate.request import Sampling, TokenLogprobs

MOST = 1e30  # of a logit: differences of two, and what a temperature makes of them, are numbers or -inf
COLDEST = 1e-30  # temperature, below which nothing changes: whatever is less likely has no chance


def draw(logits_V: Tensor, sampling: Sampling, uniform: float, prompt: Sequence[int], written: Sequence[int]) -> int:
    """One token.

    uniform: in [0, 1): where in the sum of probabilities, in the order of the ids, the token is taken.
    prompt, written: the tokens so far, which penalties look at.
    """
    if sampling.changes_logits:
        logits_V = changed(logits_V, sampling, prompt, written)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scores_V, ids_V = kept((logits_V - logits_V.max()) / max(sampling.temperature, COLDEST), sampling)
    sums_V = scores_V.double().softmax(0).cumsum(0)
    place = int(torch.searchsorted(sums_V, uniform * float(sums_V[-1]), right=True))
    place = min(place, len(sums_V) - 1)
    return place if ids_V is None else int(ids_V[place])


def changed(logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], written: Sequence[int]) -> Tensor:
    """The logits after penalties and bias, which may be as large as they like: finite."""
    logits_V = logits_V.clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *written}))
        before = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(before < 0, before * penalty, before / penalty)
    if written and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.tensor(written).unique(return_counts=True)
        logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token, bias in sampling.logit_bias.items():
        logits_V[token] += bias
    return logits_V.nan_to_num(nan=0.0).clamp(-MOST, MOST)


def kept(scores_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The scores that top_k, top_p and min_p leave, in the order of their ids; and the ids, None for all."""
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return scores_V, None
    k = min(sampling.top_k or len(scores_V), len(scores_V))
    best_K, ids_K = scores_V.topk(k) if k < len(scores_V) else scores_V.sort(descending=True, stable=True)
    p_K = best_K.double().softmax(0)
    n = k
    if sampling.top_p < 1:  # the first of them that reach it together
        n = int((p_K.cumsum(0) < sampling.top_p).sum()) + 1
    if sampling.min_p > 0:
        n = min(n, int((p_K >= sampling.min_p * p_K[0]).sum()))
    order_K = ids_K[:n].argsort()
    return best_K[order_K], ids_K[order_K]


def uniform_at(seed: int, sample: int, place: int) -> float:
    """The number in [0, 1) that the token at a place of a sample is drawn by: Philox, a counter-based generator."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, sample, place])).random())


def logprobs_of(logits_TV: Tensor, tokens: Sequence[int], n_likeliest: int) -> list[TokenLogprobs]:
    """Of each token, by the logits of its place.  Shapes: logits_TV, T tokens."""
    logprobs_TV = logits_TV.float().log_softmax(-1)
    own = logprobs_TV[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
    one = n_likeliest == 1  # of large vocabularies the faster way
    best = logprobs_TV.max(-1, keepdim=True) if one else logprobs_TV.topk(min(n_likeliest, logits_TV.shape[-1]), dim=-1)
    likeliest = [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [TokenLogprobs(*entry) for entry in zip(tokens, own, likeliest, strict=True)]
