"""Scores of continuations beside those of the whole text's logits, and what is refused."""

from __future__ import annotations

import pytest
import torch

from megagpt.config import ModelConfig
from megagpt.evaluate.score import Pair, score
from megagpt.generate.stage import build_stage
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks

MODEL = ModelConfig(n_layers=2, d_model=32, n_heads=4, seq_len=12, vocab_size=97, init="normal", init_std=0.3)
PAIRS: list[Pair] = [
    ([1], [2]),
    ([3, 4, 5], [6, 7]),
    ([3, 4, 5], [6, 8]),
    ([3, 4, 5], [6, 7]),
    (list(range(10)), [1, 2, 3]),  # one token more than the context holds: the last one is not read
    (list(range(40)), [9, 8]),
    ([7], list(range(12))),
]


def scores(tp: int, pp: int, dp: int) -> tuple[list[tuple[float, bool]], int]:
    """On a rank: and how many pairs it was told of."""
    told: list[tuple[int, int]] = []
    stage = build_stage(MODEL, build_mesh("cpu", pp=pp, dp=dp, tp=tp))
    found = [(one.logprob, one.greedy) for one in score(stage, PAIRS, lambda *n: told.append(n))]
    assert told == [(i + 1, len(told)) for i in range(len(told))]
    return found, len(told)


def expected() -> list[tuple[float, bool]]:
    """By the attention of training."""
    (found,) = run_ranks(_expected, 1)
    return found


@torch.no_grad()
def _expected() -> list[tuple[float, bool]]:
    stage, found = build_stage(MODEL, build_mesh("cpu", pp=1, dp=1, tp=1)), []
    for context, continuation in PAIRS:
        text = [*context, *continuation][-(MODEL.seq_len + 1) :]
        logits_TV = stage.logits(stage(torch.tensor([text[:-1]]))[0])[-len(continuation) :]
        labels_T = torch.tensor(list(continuation))
        logprobs_T = logits_TV.log_softmax(-1).gather(-1, labels_T[:, None])
        found.append((float(logprobs_T.sum()), bool((logits_TV.argmax(-1) == labels_T).all())))
    return found


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 2, 1), (1, 1, 2)], ids=str)
def test_scores_are_those_of_whole_texts(tp, pp, dp):
    ranks, wanted, n_distinct = run_ranks(scores, tp * pp * dp, tp, pp, dp), expected(), len(PAIRS) - 1
    assert sum(told for _, told in ranks) == n_distinct * tp * pp  # each model reads each pair once
    for found, _ in ranks:
        for (ours, ours_greedy), (theirs, theirs_greedy) in zip(found, wanted, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4) and ours_greedy == theirs_greedy


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * 13)])
def test_what_cannot_be_scored_is_refused(pair):
    with pytest.raises(RuntimeError, match="wanted one or more, and 1 to 12"):
        run_ranks(_refused, 1, pair)


def _refused(pair: Pair) -> None:
    score(build_stage(MODEL, build_mesh("cpu", pp=1, dp=1, tp=1)), [pair])
