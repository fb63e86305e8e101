"""The engine on one process: who else is in the batch plays no part; ends of texts; and what was given up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megagpt.config import ModelConfig
from megagpt.data.tokenizers.bytes import ByteTokenizer
from megagpt.errors import UserError
from megagpt.generate.engine import Engine
from megagpt.generate.limits import Limits
from megagpt.generate.request import Completion, Request, Sampling
from megagpt.generate.stage import Stage, build_stage
from megagpt.model.stream import Stream
from megagpt.parallel.mesh import single_process_mesh
from tests.tolerances import assert_close

MODEL = ModelConfig(n_layers=2, d_model=24, n_heads=4, d_ff=40, seq_len=32, vocab_size=257, init="normal", init_std=0.4)
DRAWN = Sampling(n_tokens=12, temperature=1.0, top_k=0, seed=3)
PROMPTS = [(7, 8, 9), (1,), tuple(range(40, 60)), (5, 200), (13,) * 9]


@pytest.fixture(scope="module")
def stage() -> Stage:
    torch.manual_seed(0)
    return build_stage(MODEL, single_process_mesh())


def engine_of(stage: Stage, n_rows: int = 4, chunk: int = 512, n_places: int = 32) -> Engine:
    return Engine(stage, Limits(n_rows=n_rows, n_places=n_places, chunk=chunk), ByteTokenizer())


def run(engine: Engine, *requests: Request) -> list[list[Completion]]:
    """All to their ends."""
    texts = {engine.add(r): [Completion() for _ in range(r.sampling.n_samples)] for r in requests}
    while not engine.idle:
        for piece in engine.step():
            texts[piece.request][piece.sample].add(piece)
    return list(texts.values())


def logits_of(stage: Stage, tokens: list[int]) -> torch.Tensor:
    """Of the whole text at once, by the attention of training.  Shapes: → (T, V)."""
    stream = Stream(torch.tensor([tokens]), torch.zeros(1, dtype=torch.int64))
    for layer in stage.layers[:-1]:
        stream = layer(stream)
    return stage.logits(stream.x[0])


@pytest.mark.parametrize(("n_rows", "chunk"), [(4, 512), (2, 3), (16, 1)])
def test_a_text_is_what_it_is_alone_whoever_is_in_the_batch(stage, n_rows, chunk):
    requests = [Request(prompt, replace(DRAWN, n_samples=2, seed=i)) for i, prompt in enumerate(PROMPTS)]
    together = run(engine_of(stage, n_rows, chunk), *requests)
    alone = [run(engine_of(stage, 1), request)[0] for request in requests]
    assert [[c.tokens for c in texts] for texts in together] == [[c.tokens for c in texts] for texts in alone]
    assert alone[0][0].tokens != alone[0][1].tokens  # samples of one request are drawn each by itself
    assert run(engine_of(stage), Request(PROMPTS[0], replace(DRAWN, seed=99)))[0][0].tokens != alone[0][0].tokens


def test_probabilities_of_prompt_and_text_are_those_of_the_whole_text_at_once(stage):
    wanted = Sampling(n_tokens=5, temperature=0, logprobs=3, prompt_logprobs=True)
    ((text,),) = run(engine_of(stage, chunk=4), Request(PROMPTS[2], wanted))
    tokens = [*PROMPTS[2], *text.tokens]
    found = text.prompt_logprobs + text.logprobs
    assert [entry.token for entry in found] == tokens and found[0].logprob is None
    expected_TV = logits_of(stage, tokens[:-1]).log_softmax(-1)
    own_T = torch.tensor([entry.logprob for entry in found[1:]])
    assert_close(own_T, expected_TV.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0], "of the tokens")
    for entry, row_V in zip(found[1:], expected_TV, strict=True):
        assert [token for token, _ in entry.likeliest] == row_V.topk(3).indices.tolist()
    assert text.tokens == expected_TV.argmax(-1)[len(PROMPTS[2]) - 1 :].tolist()


def test_a_prompt_can_be_scored_alone(stage):
    ((text,),) = run(engine_of(stage), Request(PROMPTS[0], Sampling(n_tokens=0, prompt_logprobs=True)))
    assert text.tokens == [] and text.finish == "length" and len(text.prompt_logprobs) == 3
    ((text,),) = run(engine_of(stage), Request(PROMPTS[0], Sampling(n_tokens=0)))
    assert text == Completion(finish="length")


def test_a_full_context_ends_the_text_or_goes_on_with_its_last_half(stage):
    wanted = Sampling(n_tokens=60, temperature=0)
    ((ended,),) = run(engine_of(stage), Request(PROMPTS[0], wanted))
    assert ended.finish == "context" and len(ended.tokens) == 32 - 3 + 1
    ((slid,),) = run(engine_of(stage), Request(PROMPTS[0], replace(wanted, slide=True)))
    assert slid.finish == "length" and len(slid.tokens) == 60 and slid.tokens[:30] == ended.tokens
    (scored,) = run(engine_of(stage), Request(tuple(range(20)), replace(wanted, slide=True, prompt_logprobs=True)))[0]
    assert [entry.token for entry in scored.prompt_logprobs] == list(range(20))  # once, though some are read anew
    window = [*PROMPTS[0], *slid.tokens[:30]][-16:]  # by hand
    for token in slid.tokens[30:46]:
        assert token == int(logits_of(stage, window)[-1].argmax())
        window.append(token)
    ((long,),) = run(engine_of(stage), Request(tuple(range(100)), replace(wanted, n_tokens=3, slide=True)))
    ((short,),) = run(engine_of(stage), Request(tuple(range(84, 100)), replace(wanted, n_tokens=3)))
    assert long.tokens == short.tokens


def test_an_end_token_and_a_stop_string_end_the_text_and_are_no_part_of_it(stage):
    ((free,),) = run(engine_of(stage), Request(PROMPTS[0], replace(DRAWN, n_tokens=20)))
    ends = (free.tokens[5],)
    ((text,),) = run(engine_of(stage), Request(PROMPTS[0], replace(DRAWN, n_tokens=20), ends))
    assert text.finish == "stop" and text.tokens == free.tokens[: free.tokens.index(ends[0])]
    shown = ByteTokenizer().decode(free.tokens)
    assert free.text == shown
    stop = shown[4:7]
    ((text,),) = run(engine_of(stage), Request(PROMPTS[0], replace(DRAWN, n_tokens=20, stop=(stop,))))
    assert text.finish == "stop" and text.text == shown[: shown.index(stop)]


def test_a_model_that_gives_no_numbers_is_told():
    broken = build_stage(MODEL, single_process_mesh())
    broken.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="the model gives NaN for the next token"):
        run(engine_of(broken), Request(PROMPTS[0], DRAWN))


def test_what_is_given_up_frees_its_row_within_a_step(stage):
    engine = engine_of(stage, n_rows=1)
    first, second = (engine.add(Request(PROMPTS[0], replace(DRAWN, seed=i))) for i in range(2))
    assert {piece.request for _ in range(3) for piece in engine.step()} == {first}
    engine.cancel(first)
    text = Completion()
    assert all(piece.request == second and text.add(piece) is None for piece in engine.step())
    while not engine.idle:
        for piece in engine.step():
            text.add(piece)
    assert text == run(engine_of(stage), Request(PROMPTS[0], replace(DRAWN, seed=1)))[0][0]
    assert engine.writer.texts == {}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "got an empty prompt wanted a token or more"),
        (Request((5, 257)), r"got token id \[257\] in prompt wanted 0 to 256"),
        (Request((5,), Sampling(logit_bias={-1: 1.0})), r"got token id \[-1\] in logit_bias"),
        (Request((5,) * 33), "got a prompt of 33 tokens wanted at most 32, the model's context"),
    ],
)
def test_what_a_model_cannot_take_is_refused(stage, request_, message):
    with pytest.raises(UserError, match=message):
        engine_of(stage).add(request_)
