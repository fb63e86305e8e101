"""The token that ends a text is no part of it, but its log-probability is told: lm_eval counts on one a step."""

from __future__ import annotations

import torch

from megagpt.generate.batching import Sample
from megagpt.generate.request import Request, Sampling
from megagpt.generate.write import Writer


def test_the_log_probability_of_the_end_is_told():
    sample = Sample(0, Request((1, 2), Sampling(temperature=0, logprobs=0), ends=(3,)), 0)
    (piece,) = Writer(None, 8).write([sample], torch.tensor([[0.0, 0.0, 0.0, 5.0]]))
    assert piece.tokens == () and piece.finish == "stop"
    (entry,) = piece.logprobs
    assert entry.token == 3 and entry.logprob is not None and -0.1 < entry.logprob < 0
