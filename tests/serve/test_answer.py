"""Pieces of texts become OpenAI's answers: whole, or as the chunks of a stream."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megagpt.generate.request import Piece, TokenLogprobs
from megagpt.serve.answer import Answer
from tests.serve.test_asked import BARE, BEGUN, SERVED, chat, completion


def whole(answer: Answer, *pieces: tuple[int, Piece]) -> dict[str, Any]:
    for index, piece in pieces:
        answer.add(index, piece)
    return answer.whole()


def chunks(answer: Answer, *pieces: tuple[int, Piece]) -> list[dict[str, Any]]:
    found = []
    for index, piece in pieces:
        answer.add(index, piece)
        chunk = answer.chunk(index, piece)
        found += [chunk] if chunk else []
    return found


def test_a_whole_completion():
    answer = Answer(completion(prompt=["ab", "c"]), SERVED)
    found = whole(
        answer,
        (1, Piece(1, 0, (120,), "x")),
        (0, Piece(0, 0, (121,), "")),
        (0, Piece(0, 0, (122,), "yz", finish="length")),
        (1, Piece(1, 0, (), "", finish="stop")),
    )
    assert found["id"].startswith("cmpl-") and found["object"] == "text_completion" and found["model"] == "small"
    assert found["choices"] == [
        {"index": 0, "finish_reason": "length", "text": "yz", "logprobs": None},
        {"index": 1, "finish_reason": "stop", "text": "x", "logprobs": None},
    ]
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


SCORED = (TokenLogprobs(97, None), TokenLogprobs(98, -2.0, ((99, -0.5),)))
WRITTEN = TokenLogprobs(120, -math.inf, ((121, -0.1), (122, -3.0)))
COLUMNS = {
    "tokens": ["a", "b", "x"],
    "token_logprobs": [None, -2.0, -9999.0],
    "top_logprobs": [None, {"c": -0.5, "b": -2.0}, {"y": -0.1, "z": -3.0, "x": -9999.0}],
    "text_offset": [0, 1, 2],
}


def test_the_prompt_is_repeated_and_scored():
    answer = Answer(completion(prompt=[97, 98], echo=True, logprobs=2, n=2), SERVED)
    pieces = [(i, Piece(0, i, (120,), "x", (WRITTEN,), SCORED, "context")) for i in range(2)]
    for i, choice in enumerate(whole(answer, *pieces)["choices"]):
        assert choice == {"index": i, "finish_reason": "length", "text": "abx", "logprobs": COLUMNS}


def test_a_stream_holds_what_the_whole_does():
    answer = Answer(completion(prompt="ab", echo=True, logprobs=2, stream=True), SERVED)
    found = chunks(
        answer,
        (0, Piece(0, 0, prompt=SCORED[:1])),
        (0, Piece(0, 0, prompt=SCORED[1:])),
        (0, Piece(0, 0, (120,), "", (WRITTEN,))),
        (0, Piece(0, 0, (), "x", finish="stop")),
    )
    choices = [chunk["choices"][0] for chunk in found]
    assert [choice["text"] for choice in choices] == ["ab", "", "", "x"]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    for name, column in COLUMNS.items():
        assert [entry for choice in choices for entry in choice["logprobs"][name]] == column
    assert {chunk["object"] for chunk in found} == {"text_completion"} and len({chunk["id"] for chunk in found}) == 1


def test_half_a_character_is_not_sent():
    answer = Answer(completion(prompt="a", stream=True, stream_options={"include_usage": True}), SERVED)
    found = chunks(answer, (0, Piece(0, 0, (0xC3,))), (0, Piece(0, 0, (0xA4,), "ä", finish="length")))
    assert [chunk["choices"][0]["text"] for chunk in found] == ["ä"] and found[0]["usage"] is None
    last = answer.last_chunk()
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 2


def test_tokens_of_one_text_are_the_likeliest_of_them():
    """What decides whether a token was the greedy one must not go away behind another with the same text."""
    answer = Answer(completion(prompt=[97, 98], echo=True, logprobs=1), SERVED)
    entry = TokenLogprobs(0xC4, -2.0, ((0xC3, -0.5),))
    found = whole(answer, (0, Piece(0, 0, (), "", (), (SCORED[0], entry), "length")))
    assert found["choices"][0]["logprobs"]["top_logprobs"][1] == {"\N{REPLACEMENT CHARACTER}": -0.5}
    assert found["choices"][0]["logprobs"]["token_logprobs"][1] == -2.0


def test_a_chat_whole_and_streamed():
    messages = [{"role": "user", "content": "hi"}]
    pieces = [(0, Piece(0, 0, (120,), "x", (WRITTEN,))), (0, Piece(0, 0, (121,), "y", finish="stop"))]
    found = whole(Answer(chat(messages=messages, logprobs=True, top_logprobs=2), SERVED), *pieces)
    (choice,) = found["choices"]
    assert found["object"] == "chat.completion" and choice["message"] == {"role": "assistant", "content": "xy"}
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("x", -9999.0, [120])
    assert [best["token"] for best in entry["top_logprobs"]] == ["y", "z"]
    streamed = chunks(Answer(chat(messages=messages, stream=True), SERVED), *pieces)
    assert [chunk["choices"][0]["delta"] for chunk in streamed] == [
        {"role": "assistant", "content": "x"},
        {"content": "y"},
    ]
    assert streamed[0]["object"] == "chat.completion.chunk" and streamed[1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_without_tokenizer_tells_ids(stream: bool):
    answer = Answer(completion(BARE, prompt=[3, 4], logprobs=0, stream=stream), BARE)
    piece = Piece(0, 0, (5,), "", (TokenLogprobs(5, -1.0),), finish="length")
    found = chunks(answer, (0, piece))[0] if stream else whole(answer, (0, piece))
    (choice,) = found["choices"]
    assert choice["token_ids"] == [5] and list(choice["prompt_token_ids"]) == [3, 4] and choice["text"] == ""
    assert choice["logprobs"]["tokens"] == ["token_id:5"] and choice["logprobs"]["token_logprobs"] == [-1.0]


@pytest.mark.parametrize(("prompt", "offsets"), [("ab", [0, 0, 1, 2]), ("\x01ab", [0, 1, 2, 3])])
def test_offsets_count_in_the_text_which_may_lack_what_begins_it(prompt: str, offsets: list[int]):
    answer = Answer(completion(BEGUN, prompt=prompt, echo=True, logprobs=0), BEGUN)
    (choice,) = whole(answer, (0, Piece(0, 0, (120,), "x", (WRITTEN,), (TokenLogprobs(1, None), *SCORED), "length")))[
        "choices"
    ]
    assert choice["text"] == prompt + "x" and choice["logprobs"]["text_offset"] == offsets


def test_a_part_of_a_character_has_no_bytes_of_text():
    messages, entry = [{"role": "user", "content": "hi"}], TokenLogprobs(0xC3, -1.0)
    answer = Answer(chat(messages=messages, logprobs=True), SERVED)
    (choice,) = whole(answer, (0, Piece(0, 0, (0xC3,), "", (entry,), finish="length")))["choices"]
    assert choice["logprobs"]["content"][0]["bytes"] is None
