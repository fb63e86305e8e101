"""What is drawn: the processors of transformers, in their order; frequencies; and no say for the neighbours."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as theirs

from megagpt.errors import UserError
from megagpt.generate.draw import changed, draw, kept, uniform_at
from megagpt.generate.request import Sampling

V = 97


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"top_k": 7}, [theirs.TopKLogitsWarper(7)]),
        ({"top_k": 0, "top_p": 0.7}, [theirs.TopPLogitsWarper(0.7)]),
        ({"top_k": 0, "min_p": 0.1}, [theirs.MinPLogitsWarper(0.1)]),
        ({"top_k": 20, "top_p": 0.8}, [theirs.TopKLogitsWarper(20), theirs.TopPLogitsWarper(0.8)]),
        ({"top_k": 0, "top_p": 0.95, "min_p": 0.05}, [theirs.TopPLogitsWarper(0.95), theirs.MinPLogitsWarper(0.05)]),
        ({"top_k": 0}, []),
        ({"top_k": 500}, []),
        ({"top_k": 0, "top_p": 1e-9}, [theirs.TopKLogitsWarper(1)]),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_what_is_kept_is_what_transformers_keeps(settings, processors):
    for _ in range(20):
        logits_V = 2 * torch.randn(V)
        expected_1V = logits_V[None] / 0.7
        for processor in processors:
            expected_1V = processor(torch.zeros(1, 1, dtype=torch.int64), expected_1V)
        scores, ids = kept(logits_V / 0.7, Sampling(**settings))
        found_V = torch.full((V,), -torch.inf)
        found_V[torch.arange(V) if ids is None else ids] = scores
        torch.testing.assert_close(found_V, expected_1V[0], rtol=0, atol=0)


def test_penalties_are_those_of_the_papers():
    logits_V, prompt, written = torch.tensor([2.0, -2.0, 1.0, 0.0, 3.0]), [0, 1], [2, 2, 3]
    repetition = Sampling(repetition_penalty=1.5)
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt + written]), logits_V[None].clone())
    assert changed(logits_V, repetition, prompt, written).tolist() == expected[0].tolist()
    of_written = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: -10.0})
    assert changed(logits_V, of_written, prompt, written).tolist() == [2.0, -2.0, 0.0, -0.75, -7.0]
    assert logits_V.tolist() == [2.0, -2.0, 1.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("settings", "likely"),
    [
        ({"temperature": 1e-300}, {2}),
        ({"logit_bias": {0: 1e300, 3: 1e39}}, {0, 3}),
        ({"logit_bias": {2: -1e300}, "top_p": 0.5}, {0, 1, 3}),
        ({"presence_penalty": 1e300}, {0, 1, 3}),
        ({"repetition_penalty": 1e-300}, {2}),
    ],
)
def test_settings_without_measure_draw_by_what_is_left(settings, likely):
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0])
    found = {draw(logits_V, Sampling(top_k=0, **settings), place / 10, [], [2]) for place in range(10)}
    assert found <= likely, found


def test_tokens_come_as_often_as_they_are_probable():
    logits_V, n = torch.tensor([0.0, 1.0, 2.0, -1.0]), 4000
    sampling = Sampling(temperature=0.5, top_k=3)
    drawn = [draw(logits_V, sampling, uniform_at(5, 0, place), [], []) for place in range(n)]
    p_V = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).div(0.5).softmax(0)
    counts_V = torch.bincount(torch.tensor(drawn), minlength=4)
    spread_V = (n * p_V * (1 - p_V)).sqrt()
    assert ((counts_V - n * p_V).abs() <= 4 * spread_V).all(), (counts_V, n * p_V)


def test_the_number_of_a_place_follows_from_seed_sample_and_place_alone():
    places = [(seed, sample, place) for seed in (0, 1, 2**64 - 1) for sample in (0, 1) for place in (0, 1, 2**32)]
    numbers = [uniform_at(*place) for place in places]
    assert len(set(numbers)) == len(places) and all(0 <= number < 1 for number in numbers)
    assert numbers == [uniform_at(*place) for place in places]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_scale_draw_a_token_that_has_a_probability(uniform):
    logits_V = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    assert draw(logits_V, Sampling(top_k=0), uniform, [], []) in (1, 2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "got temperature=-1.0 wanted a number from 0"),
        ({"top_p": 0.0}, "got top_p=0.0 wanted above 0, at most 1"),
        ({"top_k": -1}, "got top_k=-1 wanted 0"),
        ({"stop": ("",)}, "wanted strings that are not empty"),
        ({"logit_bias": {3: float("nan")}}, "got logit_bias="),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        Sampling(**setting)
