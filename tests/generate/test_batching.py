"""Rows join and leave: each token of each text goes through once, in order, in the row that holds what precedes it."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from megagpt.generate.batching import Batching, Group, Pass, Sample
from megagpt.generate.request import Request, Sampling

N_PLACES = 24


class FakeCache:
    """Holds, by row, the tokens that went through."""

    def __init__(self, n_rows: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(n_rows)]

    def move(self, row: int, to: int) -> None:
        self.rows[to] = list(self.rows[row])

    def take(self, done: Pass) -> None:
        for i, (sample, count) in enumerate(done.items):
            row = done.first_row + i
            self.rows[row] = self.rows[row][: sample.n_done] + sample.window(count)
            seen = sample.tokens[sample.n_dropped : sample.n_dropped + sample.n_done + count]
            assert self.rows[row] == seen, "a row holds what is another's"


def requests(random: np.random.Generator, n: int) -> list[Request]:
    return [
        Request(
            tuple(random.integers(0, 1000, random.integers(1, 20)).tolist()),
            Sampling(n_tokens=int(random.integers(0, 30)), slide=bool(random.integers(2))),
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_every_text_goes_through_whole_with_any_stages_rows_and_arrivals(seed: int):
    random = np.random.default_rng(seed)
    n_stages, n_rows, chunk = int(random.integers(1, 4)), int(random.integers(1, 5)), int(random.integers(1, 9))
    caches = [FakeCache(n_rows) for _ in range(n_stages)]
    batching = Batching([Group(i, n_rows, chunk, c.move) for i, c in enumerate(caches)])
    to_come = deque(Sample(i, request, 0) for i, request in enumerate(requests(random, 30)))
    everyone, given_up = list(to_come), set(random.integers(0, 30, 3).tolist())
    in_flight: deque[Pass | None] = deque([None] * (n_stages - 1))
    for _ in range(5000):
        if to_come and random.random() < 0.3:
            batching.waiting.append(to_come.popleft())
        for sample in list(batching):
            if sample.number in given_up and random.random() < 0.1 and sample.finish is None:
                sample.finish = "cancelled"
                batching.drop_ended()
        in_flight.appendleft(batching.next_pass())
        leaving = in_flight.pop()
        if leaving is None:
            if not to_come and len(batching) == 0:
                break
            continue
        caches[leaving.group.number].take(leaving)
        counts = leaving.counts
        for sample, draws in zip(leaving.samples, leaving.draws, strict=True):
            if draws and sample.finish is None:
                write(sample)
        batching.passed(leaving, counts, N_PLACES)
    assert not to_come and len(batching) == 0, "somebody waits for ever"
    assert {s.finish for s in everyone if s.number not in given_up} <= {"length", "context"}
    for sample in everyone:
        if sample.finish == "length":
            assert sample.n_written == sample.sampling.n_tokens


def write(sample: Sample) -> None:
    """A token, or the end."""
    if sample.sampling.n_tokens == 0:
        sample.finish = "length"
        return
    sample.tokens.append(10_000 * sample.number + sample.n_written)
    if sample.n_written == sample.sampling.n_tokens:
        sample.finish = "length"
    elif sample.n_window > N_PLACES and not sample.sampling.slide:
        sample.finish = "context"


def test_few_texts_keep_all_stages_busy():
    batching = Batching([Group(i, 8, 4, lambda row, to: None) for i in range(2)])
    for i in range(4):
        batching.waiting.append(Sample(i, Request((1, 2)), 0))
    first, second, third = (batching.next_pass() for _ in range(3))
    assert first and second and [len(p.samples) for p in (first, second)] == [2, 2]
    assert third is None  # both groups are under way


def test_a_long_prompt_takes_turns_with_those_that_write():
    group = Group(0, 2, 4, lambda row, to: None)
    batching = Batching([group])
    batching.waiting.append(Sample(0, Request((1,)), 0))
    order = []
    for step in range(12):
        if step == 2:
            batching.waiting.append(Sample(1, Request(tuple(range(16))), 0))
        done = batching.next_pass()
        assert done is not None
        order.append([sample.number for sample in done.samples])
        counts = done.counts
        for sample, draws in zip(done.samples, done.draws, strict=True):
            if draws:
                sample.tokens.append(0)
        batching.passed(done, counts, 100)
    assert order[:2] == [[0], [0]] and order[2:9] == [[1], [0], [1], [0], [1], [0], [1]]
    assert order[9:] == [[0, 1]] * 3
