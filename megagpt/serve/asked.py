"""What OpenAI's API asks for: a body, checked, as requests of the engine. No HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from megagpt.errors import UserError
from megagpt.generate.complete import Prompt, request_of
from megagpt.generate.request import Request, Sampling
from megagpt.serve.api_error import ApiError
from megagpt.serve.served import Served

DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it
MAX_STOPS, MAX_LIKELIEST, MAX_CHOICES = 16, 20, 128


@dataclass(frozen=True)
class Asked:
    """requests: one a prompt, each for n texts.  echoed: their prompts as text, where these are to be repeated.

    logprobs: of so many likeliest tokens beside the one that is there, None for none.
    """

    kind: Literal["completion", "chat"]
    requests: tuple[Request, ...]
    echoed: tuple[str, ...] | None
    logprobs: int | None
    stream: bool
    usage_in_stream: bool
    token_ids: bool

    @property
    def n(self) -> int:
        """Texts to a prompt."""
        return self.requests[0].sampling.n_samples


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, as a list of them."""
    several = value if isinstance(value, list) and value and type(value[0]) is not int else [value]
    for prompt in several:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(i) is int for i in prompt)):
            raise ValueError("wanted text, token ids, or a list of either")
    return several


def _stops(value: Any) -> tuple[str, ...]:
    several = value if isinstance(value, list) else [value]
    if not all(isinstance(stop, str) and stop for stop in several) or len(several) > MAX_STOPS:
        raise ValueError(f"wanted a text that is not empty, or a list of at most {MAX_STOPS}")
    return tuple(several)


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or not all(k.isdecimal() and type(v) in (int, float) for k, v in value.items()):
        raise ValueError("wanted an object of token ids and numbers")
    return {int(token): float(bias) for token, bias in value.items()}


def _text(value: Any) -> str:
    """Of a message: by itself, or in parts."""
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise ValueError('wanted text, or a list of parts {"type": "text", "text": …}')
    return "".join(texts)


class Body(BaseModel):
    """An object of JSON. A field that is null is one that is not there; one that is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class StreamOptions(Body):
    """Of OpenAI's API."""

    include_usage: bool = False


class Ask(Body):
    """What completions and chat share. The last four are beyond OpenAI's API."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[Any, AfterValidator(_biases)] = {}
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[Any, AfterValidator(_stops)] = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None  # OpenAI's word for whom it is asked; nothing follows from it
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    return_token_ids: bool = False


class CompletionBody(Ask):
    """POST /v1/completions."""

    prompt: Annotated[Any, AfterValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LIKELIEST)


class Message(Body):
    """Of a chat."""

    role: str
    content: Annotated[Any, AfterValidator(_text)] = ""
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As a template takes it."""
        return {"role": self.role, "content": self.content} | ({"name": self.name} if self.name else {})


class ChatBody(Ask):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LIKELIEST)


class TokenizeBody(Body):
    """POST /tokenize, as vLLM has it. add_special_tokens: what begins a text, as a completion's prompt gets it."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


B = TypeVar("B", bound=Body)


def parse(kind: type[B], raw: bytes) -> B:
    """A body of a kind from its JSON.  Raises ApiError 400, which names the first field that is wrong."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as failed:
        error = failed.errors(include_url=False)[0]
        param = ".".join(map(str, error["loc"])) or None
        raise ApiError(400, _words(kind, error, param), param) from None


def _words(kind: type[Body], error: Any, param: str | None) -> str:
    """What is wrong, in one line."""
    if param is None:
        return f"the body is no request: {error['msg']}; wanted an object of JSON"
    if error["type"] == "extra_forbidden":
        return f"{param} is not known here; wanted one of {', '.join(kind.model_fields)}"
    if error["type"] == "missing":
        return f"{param} is missing; give it"
    wanted = error["msg"].removeprefix("Value error, ").replace("Input should be", "wanted")
    return f"got {param}={error['input']!r:.60}; {wanted}"


def completion(body: CompletionBody, served: Served) -> Asked:
    """Requests for completions; prompt i is drawn with seed + i.  Raises ApiError where the model cannot take them."""
    served.check_name(body.model)
    scored = body.echo and body.logprobs is not None
    sampling = _sampling(body, served, logprobs=body.logprobs, prompt_logprobs=scored)
    echoed = None
    if body.echo:
        echoed = tuple(prompt if isinstance(prompt, str) else served.decode(prompt, "prompt") for prompt in body.prompt)
    requests = _requests(body.prompt, sampling, served, body.max_tokens, DEFAULT_TOKENS, "prompt")
    return _asked("completion", body, served, requests, echoed)


def chat(body: ChatBody, served: Served) -> Asked:
    """The request for an answer to messages.  Raises ApiError where the model cannot take them."""
    served.check_name(body.model)
    if served.template is None:
        message = "the model's tokenizer brings no chat template; ask /v1/completions"
        raise ApiError(400, message, "messages", "no_chat_template")
    text = served.template.render([message.plain() for message in body.messages])
    prompt = served.encode(text)  # what begins it is the template's to say
    sampling = _sampling(body, served, logprobs=body.top_logprobs if body.logprobs else None)
    max_tokens = body.max_completion_tokens or body.max_tokens
    requests = _requests([prompt], sampling, served, max_tokens, served.n_places, "messages")
    return _asked("chat", body, served, requests, None)


def _sampling(body: Ask, served: Served, **more: Any) -> Sampling:
    if body.stop and served.tokenizer is None:
        raise ApiError(400, "the model has no tokenizer, which stop needs; leave it out", "stop")
    seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
    with _as_api_error():
        return Sampling(
            n_samples=body.n,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=body.logit_bias,
            stop=body.stop,
            seed=seed,
            **more,
        )


def _requests(
    prompts: Sequence[Prompt], sampling: Sampling, served: Served, max_tokens: int | None, default: int, param: str
) -> tuple[Request, ...]:
    """One of each prompt. The last token that is written needs no place in the context."""
    if (n := sampling.n_samples * len(prompts)) > served.max_texts:
        message = f"got {n} texts in one request (prompts times n), wanted at most {served.max_texts}; ask for fewer"
        raise ApiError(400, message, "n")
    requests = []
    for i, prompt in enumerate(prompts):
        ids = served.prompt(prompt) if isinstance(prompt, str) else prompt
        room = served.n_places + 1 - len(ids)
        n_tokens = min(default, room) if max_tokens is None else max_tokens
        if room < 1 or n_tokens > room:
            message = (
                f"got {len(ids)} tokens of {param} and {max(n_tokens, 0)} to write, wanted at most "
                f"{served.n_places + 1} together, {served.n_places} of them read; shorten it or lower max_tokens"
            )
            raise ApiError(400, message, param, "context_length_exceeded")
        seeded = replace(sampling, n_tokens=n_tokens, seed=(sampling.seed + i) % 2**64)
        with _as_api_error():
            request = request_of(ids, seeded, served.tokenizer, served.bounds)
            request.check(served.vocab_size, served.n_places)
        requests.append(request)
    return tuple(requests)


def _asked(
    kind: Literal["completion", "chat"],
    body: Ask,
    served: Served,
    requests: tuple[Request, ...],
    echoed: tuple[str, ...] | None,
) -> Asked:
    ids, usage = body.return_token_ids or served.tokenizer is None, body.stream_options.include_usage
    return Asked(kind, requests, echoed, requests[0].sampling.logprobs, body.stream, usage, ids)


@contextmanager
def _as_api_error() -> Iterator[None]:
    """What the engine does not take is the client's fault."""
    try:
        yield
    except UserError as error:
        raise ApiError(400, str(error), error.keys[0] if error.keys else None) from None
