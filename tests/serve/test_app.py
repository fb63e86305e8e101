"""A server, asked over HTTP by OpenAI's own client and by what does not keep to any rule."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megagpt.generate import Sampling, complete
from megagpt.generate.trained import Trained
from tests.serve.serving import Serving, ask, opened, serving
from tests.serve.small_run import write_run

openai = pytest.importorskip("openai", reason="openai is missing, the client: pip install 'megagpt[dev]'")
KEY = "a key, à"  # its last byte is a space to Latin-1


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[Trained]:
    with opened(write_run(tmp_path_factory.mktemp("runs") / "small")) as found:
        yield found


@pytest.fixture(scope="module")
def server(trained: Trained) -> Iterator[Serving]:
    with serving(trained, batch=4, max_waiting=16, max_body_kib=16) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Any:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0)


def alone(trained: Trained, prompt: str, **sampling: Any) -> str:
    """The text that the engine writes by itself."""
    return complete(trained.stage, trained.tokenizer, [prompt], Sampling(top_k=0, **sampling))[0][0].text


def test_a_completion_is_what_the_engine_writes(trained: Trained, client: Any):
    found = client.completions.create(model="small", prompt="def ", max_tokens=9, temperature=0)
    assert found.choices[0].text == alone(trained, "def ", n_tokens=9, temperature=0)
    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 9


def test_a_stream_ends_with_its_usage(server: Serving, trained: Trained, client: Any):
    asked = {"model": "small", "prompt": ["a", "b"], "max_tokens": 9, "seed": 3, "logit_bias": {"256": -100}}
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts = ["".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) for i in range(2)]
    sampling = {"n_tokens": 9, "temperature": 1.0, "logit_bias": {256: -100}}
    assert texts == [alone(trained, p, seed=3 + i, **sampling) for i, p in enumerate("ab")]
    assert chunks[-1].usage.total_tokens == 20 and [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    _, headers, raw = ask(f"{server.address}/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True})
    assert headers["content-type"].startswith("text/event-stream")
    assert raw.startswith("data: {") and raw.endswith("data: [DONE]\n\n")


def test_a_chat(trained: Trained, client: Any):
    asked = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    text = alone(trained, "<user>hi\n<assistant>", n_tokens=5, temperature=0)
    assert found.choices[0].message.content == text and found.choices[0].message.role == "assistant"
    assert len(found.choices[0].logprobs.content[0].top_logprobs) == 2
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text


def test_models_and_tokens(server: Serving, client: Any):
    (model,) = client.models.list().data
    assert model.id == "small" and client.models.retrieve("small").max_model_len == 64
    tokens = ask(f"{server.address}/tokenize", {"prompt": "hé", "add_special_tokens": False})[2]
    assert tokens == {"count": 3, "max_model_len": 64, "tokens": [104, 195, 169]}
    assert ask(f"{server.address}/detokenize", {"tokens": tokens["tokens"]})[2] == {"prompt": "hé"}
    info = ask(f"{server.address}/tokenizer_info")[2]
    assert ask(f"{server.address}/tokenize", {"prompt": info["eos_token"]})[2]["tokens"] == [256]


def test_errors_are_the_clients_own(client: Any):
    with pytest.raises(openai.NotFoundError, match="got model 'gpt-4', wanted 'small'"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="wanted at most 65 together") as failed:
        client.completions.create(model="small", prompt="a" * 60, max_tokens=9)
    assert failed.value.code == "context_length_exceeded" and failed.value.param == "prompt"


@pytest.mark.parametrize(
    ("path", "body", "options", "status", "words"),
    [
        ("/nope", None, {}, 404, "there is no '/nope' here"),
        ("/v1/completions", None, {}, 405, "does not take GET"),
        ("/v1/completions", b"{", {}, 400, "the body is no request"),
        ("/v1/completions", b" " * 17000, {}, 413, "the body is longer than 16384 bytes"),
        ("/v1/completions", {"prompt": "a", "n": 21}, {}, 400, "wanted at most 20"),
        ("/v1/models", None, {"Origin": "http://elsewhere.example"}, 403, "only the page of this server"),
        ("/v1/models", None, {"Host": "rebound.example"}, 403, "listens for its own machine"),
        ("/detokenize", {"tokens": [999]}, {}, 400, "got token id 999, wanted 0 to 256"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_errors_are_json(server: Serving, path: str, body: Any, options: dict[str, str], status: int, words: str):
    found, _, answer = ask(server.address + path, body, **options)
    assert found == status and words in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_body_without_length_is_cut_off_too(server: Serving):
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"2000\r\n" + b" " * 0x2000 + b"\r\n" + b"3000\r\n" + b" " * 0x3000 + b"\r\n0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def wait_for(happens: Callable[[], bool]) -> None:
    """Until it does; a test's own limit ends a wait for what never comes."""
    while not happens():
        time.sleep(0.01)


def metric(server: Serving, name: str) -> float:
    text = ask(f"{server.address}/metrics")[2]
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(server: Serving, stream: bool):
    written = metric(server, "megagpt_generated_tokens_total")
    host, port = server.address.removeprefix("http://").split(":")
    body = b'{"prompt": "a", "n": 20, "max_tokens": 60, "logit_bias": {"256": -100}, "stream": %s}'
    body %= str(stream).lower().encode()
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_for(lambda: metric(server, "megagpt_texts_running") == 4)
        assert metric(server, "megagpt_texts_waiting") == 16
    wait_for(lambda: metric(server, "megagpt_texts_running") == 0)
    assert metric(server, "megagpt_texts_waiting") == 0
    assert metric(server, "megagpt_generated_tokens_total") - written < 20 * 60


def test_a_full_queue_says_when_to_come_again(server: Serving):
    url, long = (
        f"{server.address}/v1/completions",
        {"prompt": "a", "n": 20, "max_tokens": 60, "logit_bias": {"256": -100}},
    )
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, url, long)
        wait_for(lambda: metric(server, "megagpt_texts_running") > 0)
        status, headers, answer = ask(url, long)
        assert (status, headers["retry-after"], answer["error"]["code"]) == (429, "1", "queue_full")
        assert first.result()[0] == 200


def test_many_clients_at_once_get_what_each_gets_alone(trained: Trained, client: Any):
    asked = [
        {"prompt": "x" * (1 + 7 * i % 40), "max_tokens": 1 + 5 * i % 23, "seed": i, "temperature": i % 2}
        for i in range(20)
    ]
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda one: client.completions.create(model="small", **one).choices[0].text, asked))
    for one, text in zip(asked, found, strict=True):
        settings = {"seed": one["seed"], "temperature": one["temperature"], "n_tokens": one["max_tokens"]}
        assert text == alone(trained, one["prompt"], **settings)


def test_a_key_is_asked_for(trained: Trained, tmp_path: Path):
    (tmp_path / "key").write_text(KEY + "\n", encoding="utf-8")
    with serving(trained, api_key_file=str(tmp_path / "key")) as server:
        models = f"{server.address}/v1/models"
        sent = KEY.encode().decode("latin-1")  # urllib encodes it so
        assert ask(models, Authorization=f"Bearer {sent}")[0] == 200
        for headers in ({}, {"Authorization": "Bearer a"}, {"Authorization": f"Basic {sent}"}, {"Authorization": "ü"}):
            status, said, answer = ask(models, **headers)
            assert (status, answer["error"]["code"], said["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
        assert ask(f"{server.address}/health")[0] == ask(server.address)[0] == 200
        assert ask(f"{server.address}/metrics")[0] == 401


def test_while_it_stops_what_runs_is_finished_and_nothing_new_is_taken(trained: Trained):
    with serving(trained, batch=1) as server, ThreadPoolExecutor() as pool:
        url, asked = f"{server.address}/v1/completions", {"prompt": "a", "n": 8, "max_tokens": 60, "seed": 1}
        whole = ask(url, asked)[2]["choices"]
        last = pool.submit(ask, url, asked)
        wait_for(lambda: metric(server, "megagpt_texts_running") > 0)
        server.stop.set()
        wait_for(lambda: ask(f"{server.address}/health")[0] == 503)
        status, _, answer = ask(url, asked)
        assert (status, answer["error"]["code"]) == (503, "stopping")
        assert last.result()[2]["choices"] == whole
