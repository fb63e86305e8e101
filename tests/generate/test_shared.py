"""Beginnings that texts share: read once, and each text what it is by itself, in every layout and for every kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import megagpt.generate.batching as batching
from megagpt.config import ModelConfig
from megagpt.generate.complete import answer
from megagpt.generate.engine import Engine
from megagpt.generate.limits import Limits
from megagpt.generate.request import Completion, Request, Sampling
from megagpt.generate.stage import Stage, build_stage
from megagpt.parallel.mesh import build_mesh, single_process_mesh
from megagpt.processes.local import run_ranks

MODEL = ModelConfig(n_layers=2, d_model=24, n_heads=4, d_ff=40, seq_len=80, vocab_size=97, init="normal", init_std=0.3)
KINDS = {
    **{name: replace(MODEL, position=name) for name in ("learned", "rotary", "alibi", "t5", "transformer_xl")},
    "windows": replace(MODEL, attention=("window:8", "dense"), n_kv_heads=1, position="rotary"),
    "windows, wider": replace(MODEL, attention=("window:24",)),
    "keys turn by the length": replace(MODEL, position="rotary", rotary_scaling="dynamic", rotary_original_len=40),
}
EXAMPLES = tuple(i * 7 % 97 for i in range(20))
QUESTIONS = [tuple((i + 1) * k % 97 for i in range(30)) for k in (3, 5)]


def scored(prompt: tuple[int, ...], first: int) -> Request:
    return Request(prompt, Sampling(n_tokens=0, prompt_logprobs=True, logprobs=2, first_scored=first))


ANSWERS = [
    scored((*EXAMPLES, *question, *((11 * k + i) % 97 for i in range(1 + 3 * k))), 50)
    for question in QUESTIONS
    for k in range(4)
]
SCHEMAS = [scored((*QUESTIONS[0], k, k, *range(40, 50)), 32) for k in (8, 9)]  # what is scored begins after they part
WRITTEN = Request(QUESTIONS[0], Sampling(n_tokens=6, n_samples=4, temperature=1.0, logprobs=3))
REQUESTS = [*ANSWERS, *SCHEMAS, WRITTEN, Request((5, 6), Sampling(n_tokens=9))]


def texts_of(stage: Stage, n_rows: int, chunk: int, worth: int, requests: list[Request]) -> list[list[Completion]]:
    """By a rule of what is worth to be shared; at 1,000 nothing is."""
    was, batching.WORTH = batching.WORTH, worth
    try:
        return answer(stage, None, requests, limits=Limits(n_rows, 80, chunk))
    finally:
        batching.WORTH = was


def on_a_rank(tp: int, pp: int, dp: int, n_rows: int, chunk: int) -> dict[str, list[list[list[Completion]]]]:
    mesh, found = build_mesh("cpu", pp=pp, dp=dp, tp=tp), {}
    for name, config in KINDS.items():
        stage = build_stage(config, mesh)
        found[name] = [texts_of(stage, n_rows, chunk, worth, REQUESTS) for worth in (16, 1000)]
    return found


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "n_rows", "chunk"), [(1, 1, 1, 16, 512), (1, 2, 1, 6, 7), (2, 1, 2, 5, 16)], ids=str
)
def test_each_text_is_what_it_is_by_itself(tp, pp, dp, n_rows, chunk):
    for found in run_ranks(on_a_rank, tp * pp * dp, tp, pp, dp, n_rows, chunk):
        for name, (shared, alone) in found.items():
            for i, (ours, theirs) in enumerate(zip(shared, alone, strict=True)):
                for one, other in zip(ours, theirs, strict=True):
                    assert (one.tokens, one.finish) == (other.tokens, other.finish), f"{name}, request {i}"
                    close(one, other, f"{name}, request {i}")


def close(one: Completion, other: Completion, what: str) -> None:
    entries = list(zip(one.prompt_logprobs + one.logprobs, other.prompt_logprobs + other.logprobs, strict=True))
    for a, b in entries:
        assert a.token == b.token and a.logprob == pytest.approx(b.logprob, abs=1e-5), what
        assert [token for token, _ in a.likeliest] == [token for token, _ in b.likeliest], what


def n_read(config: ModelConfig, requests: list[Request], n_rows: int = 16) -> int:
    """Tokens that went through the model."""
    stage, read = build_stage(config, single_process_mesh()), 0

    def count(_: torch.nn.Module, inputs: tuple) -> None:
        nonlocal read
        read += inputs[0].x.numel()

    stage.layers[0].register_forward_pre_hook(count)
    engine = Engine(stage, Limits(n_rows, 80))
    for request in requests:
        engine.add(request)
    while not engine.idle:
        engine.step()
    return read


def test_what_is_shared_goes_through_the_model_once():
    own = sum(len(request.prompt) - 1 - 49 for request in ANSWERS)
    assert n_read(MODEL, ANSWERS) == 20 + 2 * 29 + own  # examples; a question but for its last token; answers
    assert n_read(KINDS["windows"], ANSWERS) == 20 + 2 * 29 + own
    assert n_read(MODEL, SCHEMAS) == 30 + 2 * 11
    assert n_read(MODEL, [WRITTEN]) == 29 + 4 * 6
    assert n_read(KINDS["keys turn by the length"], ANSWERS) == sum(len(request.prompt) - 1 for request in ANSWERS)


def test_what_is_asked_of_the_beginning_itself_is_read_by_each():
    echoed = replace(WRITTEN, sampling=replace(WRITTEN.sampling, prompt_logprobs=True))
    assert n_read(MODEL, [echoed]) == 4 * (30 + 5)
    assert n_read(MODEL, [scored(request.prompt, first=0) for request in SCHEMAS]) == 2 * 41


def test_more_texts_than_rows_take_turns():
    own = sum(len(request.prompt) - 1 - 49 for request in ANSWERS)
    assert n_read(MODEL, ANSWERS, n_rows=4) == 2 * (20 + 29) + own
    assert n_read(MODEL, ANSWERS, n_rows=1) == sum(len(request.prompt) - 1 for request in ANSWERS)
