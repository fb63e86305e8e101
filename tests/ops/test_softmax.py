"""Softmax of attention scores: the reference against the definition spelled out, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from megagpt.ops.softmax import attention_softmax


def spelled_out(scores: list[float], position: int, scale: float, window: int, slope: float) -> list[float]:
    """One query's probabilities, causal and with a window, key by key."""
    seen = [s for s in range(len(scores)) if position - window < s <= position]
    weights = {s: math.exp(scale * scores[s] + slope * (s - position)) for s in seen}
    return [weights.get(s, 0.0) / sum(weights.values()) for s in range(len(scores))]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_each_query_sees_the_window_that_ends_at_its_own_key(kernels: str):
    n_queries, n_keys, window, slopes = 3, 7, 4, [0.5, 0.25]
    scores_BHTS = torch.randn(1, 2, n_queries, n_keys, generator=torch.Generator().manual_seed(0))
    wanted = [
        [spelled_out(row, t + n_keys - n_queries, 0.3, window, slopes[h]) for t, row in enumerate(head)]
        for h, head in enumerate(scores_BHTS[0].tolist())
    ]
    got = attention_softmax(
        scores_BHTS, scale=0.3, causal=True, window=window, slopes_H=torch.tensor(slopes), kernels=kernels
    )
    torch.testing.assert_close(got[0], torch.tensor(wanted))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_what_may_not_be_attended_changes_nothing(kernels: str):
    scores_BHTS = torch.randn(1, 1, 4, 6, requires_grad=True)
    mask = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    mask[..., 2] = False
    mask[:, :, 1] = False  # no key at all
    p = attention_softmax(scores_BHTS, causal=True, mask=mask, kernels=kernels)
    spoilt = torch.where(mask & torch.ones(4, 6).tril(2).bool(), scores_BHTS, torch.nan)
    assert torch.equal(attention_softmax(spoilt, causal=True, mask=mask, kernels=kernels), p)
    assert (p[:, :, 1] == 0).all()
    (grad,) = torch.autograd.grad(p.square().sum(), scores_BHTS)
    assert (grad[p == 0] == 0).all()
    assert (grad[p != 0] != 0).any()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(1, 1, 4, 5)}, "mask"),
        ({"slopes_H": torch.ones(3)}, "slopes"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(keywords: dict, message: str):
    with pytest.raises(ValueError, match=message):
        attention_softmax(torch.zeros(1, 2, 4, 5), **keywords)


def test_scores_of_three_dimensions_are_refused():
    with pytest.raises(ValueError, match="wanted \\(B, H, T, S\\)"):
        attention_softmax(torch.zeros(2, 4, 5))
