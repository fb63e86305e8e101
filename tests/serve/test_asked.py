"""Bodies of OpenAI's API become requests of the engine, or an error that names the field."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from megagpt.data.tokenizers.bytes import ByteTokenizer
from megagpt.data.tokenizers.tokenizer import Bounds
from megagpt.generate.request import Request, Sampling
from megagpt.serve import asked
from megagpt.serve.api_error import ApiError
from megagpt.serve.asked import Asked
from megagpt.serve.chat import ChatTemplate
from megagpt.serve.served import Served
from tests.serve.serving import CHATML

SERVED = Served("small", ByteTokenizer(), 257, n_places=32, max_texts=8, template=ChatTemplate(CHATML, {}))
BEGUN = replace(SERVED, bounds=Bounds(begin=(1,), ends=(4, 256)))  # as LLaMA's: a token begins a text, two may end it
BARE = replace(SERVED, tokenizer=None, template=None)
END = 256


def completion(served: Served = SERVED, /, **body: Any) -> Asked:
    return asked.completion(asked.parse(asked.CompletionBody, json.dumps(body).encode()), served)


def chat(served: Served = SERVED, /, **body: Any) -> Asked:
    return asked.chat(asked.parse(asked.ChatBody, json.dumps(body).encode()), served)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [(97, 98)]),
        (["a", "bc"], [(97,), (98, 99)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
        (["a", [98]], [(97,), (98,)]),
        ("", [(END,)]),
        ("<|endoftext|>", [(END,)]),
    ],
)
def test_prompts_are_text_or_ids_one_or_several(prompt: Any, ids: list[tuple[int, ...]]):
    assert [request.prompt for request in completion(prompt=prompt).requests] == ids


@pytest.mark.parametrize(
    ("prompt", "ids"), [("a", (1, 97)), ("\x01a", (1, 97)), ("", (1,)), ([97], (97,)), ([1, 97], (1, 97))]
)
def test_what_begins_a_text_is_there_once(prompt: Any, ids: tuple[int, ...]):
    (request,) = completion(BEGUN, prompt=prompt).requests
    assert request.prompt == ids and request.ends == (4, 256)


def test_what_begins_a_chat_is_the_templates_to_say():
    (request,) = chat(BEGUN, messages=[{"role": "user", "content": "hi"}]).requests
    assert request.prompt[0] == ord("<") and request.ends == (4, 256)


def test_every_field_reaches_the_sampling():
    found = completion(
        prompt=["a", "b"], max_tokens=5, n=3, temperature=0.5, top_p=0.9, stop=["x", "yz"], echo=True, logprobs=2,
        seed=-1, logit_bias={"97": -3}, presence_penalty=0.1, frequency_penalty=0.2, user="me", model="small",
        stream=True, stream_options={"include_usage": True}, top_k=7, min_p=0.05, repetition_penalty=1.2,
        return_token_ids=True,
    )  # fmt: skip
    first = Sampling(
        n_tokens=5, n_samples=3, temperature=0.5, top_k=7, top_p=0.9, min_p=0.05, repetition_penalty=1.2,
        presence_penalty=0.1, frequency_penalty=0.2, logit_bias={97: -3.0}, seed=2**64 - 1, stop=("x", "yz"),
        logprobs=2, prompt_logprobs=True,
    )  # fmt: skip
    assert found.requests == (Request((97,), first, (END,)), Request((98,), replace(first, seed=0), (END,)))
    assert (found.echoed, found.n, found.logprobs) == (("a", "b"), 3, 2)
    assert found.stream and found.usage_in_stream and found.token_ids


def test_defaults_are_those_of_openai_and_nulls_are_defaults():
    found = completion(prompt="a", temperature=None, stop=None, logprobs=None, tools=None)
    seed = found.requests[0].sampling.seed
    assert found.requests[0].sampling == Sampling(n_tokens=16, temperature=1.0, top_k=0, top_p=1.0, seed=seed)
    assert completion(prompt="a").requests[0].sampling.seed != seed, "another seed each time"
    assert not found.stream and found.echoed is None and not found.token_ids


def test_a_chat_is_written_by_the_template_and_may_fill_the_context():
    found = chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    (request,) = found.requests
    assert bytes(request.prompt).decode() == "<user>hi\n<assistant>"
    assert request.sampling.n_tokens == 32 + 1 - len(request.prompt) and found.logprobs is None
    limited = chat(messages=[{"role": "user", "content": "hi"}], max_completion_tokens=3, logprobs=True, top_logprobs=4)
    assert limited.requests[0].sampling.n_tokens == 3 and limited.logprobs == 4


def test_a_context_is_filled_to_its_last_place():
    assert completion(prompt=[1] * 32, max_tokens=1).requests[0].sampling.n_tokens == 1
    assert completion(prompt=[1] * 32).requests[0].sampling.n_tokens == 1
    assert completion(prompt=[1], max_tokens=32).requests[0].sampling.n_tokens == 32


BAD = [
    ({}, "prompt is missing; give it", "prompt"),
    ({"prompt": 3}, "got prompt=3; wanted text, token ids, or a list of either", "prompt"),
    ({"prompt": [1, "a"]}, "wanted text, token ids", "prompt"),
    ({"prompt": [True]}, "wanted text, token ids", "prompt"),
    ({"prompt": []}, "got an empty prompt", "prompt"),
    ({"prompt": [257]}, "got token id [257] in prompt wanted 0 to 256", "prompt"),
    ({"prompt": "a", "max_tokens": 33}, "got 1 tokens of prompt and 33 to write, wanted at most 33 together", "prompt"),
    ({"prompt": "a" * 33}, "got 33 tokens of prompt and 0 to write, wanted at most 33 together, 32 of them", "prompt"),
    ({"prompt": "a", "n": 9}, "got 9 texts in one request (prompts times n), wanted at most 8", "n"),
    ({"prompt": ["a"] * 9}, "got 9 texts in one request", "n"),
    ({"prompt": "a", "temperature": -1}, "got temperature=-1; ", "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "got temperature='hot'; ", "temperature"),
    ({"prompt": "a", "top_p": 0}, "got top_p=0; ", "top_p"),
    ({"prompt": "a", "max_tokens": -1}, "got max_tokens=-1; ", "max_tokens"),
    ({"prompt": "a", "max_tokens": 1.5}, "got max_tokens=1.5; ", "max_tokens"),
    ({"prompt": "a", "stop": ""}, "wanted a text that is not empty", "stop"),
    ({"prompt": "a", "stop": ["a"] * 17}, "or a list of at most 16", "stop"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "wanted an object of token ids and numbers", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"999": 1}}, "got token id [999] in logit_bias", "logit_bias"),
    ({"prompt": "a", "seed": 2**64}, "got seed=", "seed"),
    ({"prompt": "a", "logprobs": 21}, "got logprobs=21; ", "logprobs"),
    ({"prompt": "a", "stream": 1}, "got stream=1; ", "stream"),
    ({"prompt": "a", "stream_options": {"x": 1}}, "stream_options.x is not known here", "stream_options.x"),
    ({"prompt": "a", "tools": []}, "tools is not known here; wanted one of model, n,", "tools"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message", "param"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(body: dict[str, Any], message: str, param: str):
    with pytest.raises(ApiError) as failed:
        completion(**body)
    assert message in str(failed.value) and len(str(failed.value)) < 400
    assert (failed.value.status, failed.value.param) == (400, param)


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{", b"\xff", b"[" * 10000, b'{"prompt": "\\ud800"}', b'{"prompt": "a", "top_p": NaN}', b"null"],
)
def test_what_is_no_json_object_is_refused(raw: bytes):
    with pytest.raises(ApiError) as failed:
        asked.parse(asked.CompletionBody, raw)
    assert failed.value.status == 400 and len(str(failed.value)) < 300


def test_another_model_is_not_found():
    with pytest.raises(ApiError, match="got model 'gpt-4', wanted 'small', the one that is served") as failed:
        completion(prompt="a", model="gpt-4")
    assert (failed.value.status, failed.value.code) == (404, "model_not_found")


def test_a_model_without_tokenizer_takes_ids_and_tells_ids():
    assert completion(BARE, prompt=[3, 4]).token_ids
    for body in ({"prompt": "a"}, {"prompt": [3], "stop": "a"}):
        with pytest.raises(ApiError, match="the model has no tokenizer"):
            completion(BARE, **body)
    with pytest.raises(ApiError, match="brings no chat template"):
        chat(BARE, messages=[{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "user", "content": 3}], [{"content": "hi"}], [{"role": "user", "content": "hi", "tool_calls": []}]],
)
def test_messages_that_are_none(messages: Any):
    with pytest.raises(ApiError) as failed:
        chat(messages=messages)
    assert failed.value.status == 400 and str(failed.value.param).startswith("messages")


def test_a_part_of_a_message_that_is_no_text_is_named():
    with pytest.raises(ApiError, match="wanted text, or a list of parts") as failed:
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert failed.value.param == "messages.0.content"
