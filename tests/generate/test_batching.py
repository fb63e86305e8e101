"""Rows join and leave: each token of each text goes through once, in order, in the row that holds what precedes it."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

import megagpt.generate.batching as batching_module
from megagpt.generate.batching import Batching, Group, Pass, Sample
from megagpt.generate.request import Request, Sampling

N_PLACES = 24


class FakeCache:
    """Holds, by row, the tokens that went through: those at position p in place p of a window's p mod W.

    n_read: tokens that went through.
    """

    def __init__(self, n_rows: int, window: int = N_PLACES) -> None:
        self.rows: list[list[int]] = [[-1] * window for _ in range(n_rows)]
        self.window, self.n_read = window, 0

    def move(self, row: int, to: int, n: int) -> None:
        self.rows[to][:n] = self.rows[row][:n]

    def take(self, done: Pass) -> None:
        for row, (sample, count) in enumerate(done.items, done.first_row):
            seen, first = sample.tokens[sample.n_dropped :], max(0, sample.n_done - self.window)
            for p in range(first, sample.n_done):
                assert self.rows[row][p % self.window] == seen[p], "a row holds what is another's"
            for p, token in enumerate(sample.window(count), sample.n_done):
                self.rows[row][p % self.window] = token
            assert count > 0
            self.n_read += count


def requests(random: np.random.Generator, n: int) -> list[Request]:
    """Half of them begin as some other one does."""
    found: list[Request] = []
    for _ in range(n):
        prompt = random.integers(0, 1000, random.integers(1, 20)).tolist()
        if found and random.integers(2):
            other = found[int(random.integers(max(0, len(found) - 3), len(found)))].prompt
            n_same = int(random.integers(len(other) + 1))
            prompt = [*other[:n_same], *prompt[n_same:]] or [0]
        slides, scores = random.integers(2, size=2)
        sampling = Sampling(
            n_tokens=int(random.integers(0, 30)),
            n_samples=int(random.integers(1, 4)),
            slide=bool(slides),
            prompt_logprobs=bool(scores),
            first_scored=int(random.integers(0, 20)),
        )
        found.append(Request(tuple(prompt), sampling))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_text_goes_through_whole_with_any_stages_rows_and_arrivals(seed: int, monkeypatch):
    monkeypatch.setattr(batching_module, "WORTH", 1 + seed % 4)
    random = np.random.default_rng(seed)
    n_stages, n_rows, chunk = int(random.integers(1, 4)), int(random.integers(1, 9)), int(random.integers(1, 9))
    window = int(random.integers(2, N_PLACES + 1))
    caches = [FakeCache(n_rows, window) for _ in range(n_stages)]
    batching = Batching([Group(i, n_rows, chunk, c.move, window) for i, c in enumerate(caches)])
    to_come = deque(
        Sample(i, request, index)
        for i, request in enumerate(requests(random, 30))
        for index in range(request.sampling.n_samples)
    )
    everyone, given_up = list(to_come), set(random.integers(0, 30, 6).tolist())
    in_flight: deque[Pass | None] = deque([None] * (n_stages - 1))
    asked: dict[Sample, list[int]] = {sample: [] for sample in everyone}  # places whose logits are told
    for _ in range(5000):
        for _ in range(int(random.integers(4)) if random.random() < 0.3 else 0):
            if to_come:
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
        for sample, count in leaving.items:
            asked[sample] += range(sample.n_dropped + sample.n_done, sample.n_dropped + sample.n_done + count)
        for sample, draws in zip(leaving.samples, leaving.draws, strict=True):
            if draws and sample.finish is None:
                write(sample)
        batching.passed(leaving, N_PLACES)
    assert not to_come and len(batching) == 0, "somebody waits for ever"
    assert {s.finish for s in everyone if s.number not in given_up} <= {"length", "context"}
    for sample in everyone:
        if sample.finish == "length":
            assert sample.n_written == sample.sampling.n_tokens
            if sample.sampling.prompt_logprobs:
                scored = set(range(max(0, sample.sampling.first_scored - 1), len(sample.request.prompt) - 1))
                assert scored <= set(asked[sample]), "what is asked of a place was read by another"


def test_a_beginning_is_read_once_by_all_that_share_it():
    """Eight questions after the same examples, four answers to each: a tree of three levels."""
    examples, questions = range(1000), [range(2000 + 100 * i, 2060 + 100 * i) for i in range(8)]
    prompts = [(*examples, *question, 9000 + 50 * i, *range(i)) for question in questions for i in range(4)]
    cache = FakeCache(32, 2000)
    batching = Batching([Group(0, 32, 512, cache.move, 2000)])
    scored = Sampling(n_tokens=0, prompt_logprobs=True, first_scored=1060)
    batching.waiting.extend(Sample(i, Request(p, scored), 0) for i, p in enumerate(prompts))
    n_passes = through(batching, cache)
    assert cache.n_read == 1000 + 8 * 59 + sum(len(p) - 1 - 1059 for p in prompts)
    assert n_passes == 2 + 1 + 1  # the examples, in chunks; questions; answers


def test_a_beginning_that_more_texts_share_than_there_are_rows_is_read_once_a_turn():
    cache = FakeCache(3, 100)
    batching = Batching([Group(0, 3, 512, cache.move, 100)])
    prompts = [(*range(50), i, i) for i in range(7)]
    batching.waiting.extend(Sample(i, Request(p, Sampling(n_tokens=0)), 0) for i, p in enumerate(prompts))
    through(batching, cache)
    assert cache.n_read == 3 * 50 + 7  # of each the last token is not read


def test_texts_that_share_are_taken_in_together_rather_than_those_of_two_kinds():
    batching = Batching([Group(0, 5, 512, lambda row, to, n: None, 100)])
    prompts = [(*range(100 * kind, 100 * kind + 50), i) for kind in range(2) for i in range(3)]
    batching.waiting.extend(Sample(i, Request(p), 0) for i, p in enumerate(prompts))
    batching.next_pass()
    assert [sample.number for sample in batching.groups[0].rows] == [0, 1, 2]


def test_one_that_comes_later_takes_its_beginning_from_one_that_writes():
    cache = FakeCache(2, 100)
    batching = Batching([Group(0, 2, 512, cache.move, 100)])
    prompt = tuple(range(50))
    first, second = (Sample(i, Request(prompt, Sampling(n_tokens=3, slide=True)), 0) for i in range(2))
    batching.waiting.append(first)
    through(batching, cache, n=1)
    batching.waiting.append(second)
    through(batching, cache)
    assert cache.n_read == 50 + 2 + 1 + 2


def test_when_a_source_is_given_up_another_one_goes_on_in_its_row():
    cache = FakeCache(3, 100)
    batching = Batching([Group(0, 3, 20, cache.move, 100)])
    samples = [Sample(i, Request((*range(50), i), Sampling(n_tokens=1)), 0) for i in range(3)]
    batching.waiting.extend(samples)
    through(batching, cache, n=1)
    samples[0].finish = "cancelled"
    batching.drop_ended()
    through(batching, cache)
    assert cache.n_read == 50 + 2 and [s.finish for s in samples[1:]] == ["length"] * 2


def test_a_model_whose_keys_turn_by_the_length_reads_each_text_by_itself():
    cache = FakeCache(2, 100)
    batching = Batching([Group(0, 2, 512, cache.move, 100, shares=False)])
    batching.waiting.extend(Sample(i, Request(tuple(range(50)), Sampling(n_tokens=1)), 0) for i in range(2))
    through(batching, cache)
    assert cache.n_read == 2 * 50


def through(batching: Batching, cache: FakeCache, n: int = 1000) -> int:
    """So many passes, or until all have ended; returns how many there were."""
    for i in range(n):
        done = batching.next_pass()
        if done is None:
            return i
        cache.take(done)
        for sample, draws in zip(done.samples, done.draws, strict=True):
            if draws and sample.finish is None:
                write(sample)
        batching.passed(done, 10_000)
    return n


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
    batching = Batching([Group(i, 8, 4, lambda row, to, n: None, N_PLACES) for i in range(2)])
    for i in range(4):
        batching.waiting.append(Sample(i, Request((1, 2)), 0))
    first, second, third = (batching.next_pass() for _ in range(3))
    assert first and second and [len(p.samples) for p in (first, second)] == [2, 2]
    assert third is None  # both groups are under way


def test_a_long_prompt_takes_turns_with_those_that_write():
    group = Group(0, 2, 4, lambda row, to, n: None, 100)
    batching = Batching([group])
    batching.waiting.append(Sample(0, Request((1,)), 0))
    order = []
    for step in range(12):
        if step == 2:
            batching.waiting.append(Sample(1, Request(tuple(range(16))), 0))
        done = batching.next_pass()
        assert done is not None
        order.append([sample.number for sample in done.samples])
        for sample, draws in zip(done.samples, done.draws, strict=True):
            if draws:
                sample.tokens.append(0)
        batching.passed(done, 100)
    assert order[:2] == [[0], [0]] and order[2:9] == [[1], [0], [1], [0], [1], [0], [1]]
    assert order[9:] == [[0, 1]] * 3
