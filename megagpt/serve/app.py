"""The server's HTTP: paths, who may ask, how much, and streams. What is asked and answered: asked.py, answer.py."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megagpt.generate.request import Piece
from megagpt.serve import asked
from megagpt.serve.answer import Answer
from megagpt.serve.api_error import ApiError
from megagpt.serve.asked import Asked
from megagpt.serve.desk import Desk, Ticket
from megagpt.serve.measures import Measures
from megagpt.serve.served import Served

T = TypeVar("T")
BODY_TIMEOUT_S = 60.0  # for a body to arrive
CLIENT_LEFT = 499  # as nginx calls it, for the metrics: nobody sees it
PAGE = Path(__file__).parent / "page.html"
PAGE_MAY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
OPEN_TO_ALL = ("/", "/health")  # without the key: they tell nothing


@dataclass(frozen=True)
class Rules:
    """key: what a client must bring, None for nothing.  local: whether only this machine can ask."""

    key: str | None
    max_body_bytes: int
    local: bool


class App:
    """The handlers of each path."""

    def __init__(self, served: Served, desk: Desk, measures: Measures, rules: Rules) -> None:
        self.served, self.desk, self.measures, self.rules = served, desk, measures, rules
        self.page = PAGE.read_bytes()

    def asgi(self) -> Starlette:
        """What uvicorn runs."""
        get, post = ["GET"], ["POST"]
        routes = [
            Route("/", self.show_page, methods=get),
            Route("/health", self.health, methods=get),
            Route("/metrics", self.metrics, methods=get),
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/{name:path}", self.model, methods=get),
            Route("/v1/completions", self.completions, methods=post),
            Route("/v1/chat/completions", self.chat, methods=post),
            Route("/tokenize", self.tokenize, methods=post),
            Route("/detokenize", self.detokenize, methods=post),
            Route("/tokenizer_info", self.tokenizer_info, methods=get),
        ]
        paths = {route.path for route in routes}
        return Starlette(
            routes=routes,
            middleware=[Middleware(Gate, app_rules=self.rules, measures=self.measures, paths=paths)],
            exception_handlers={ApiError: _error, HTTPException: _refused, Exception: _defect},
        )

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = asked.parse(asked.CompletionBody, await self.body(request))
        return await self.answer(request, asked.completion(body, self.served))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = asked.parse(asked.ChatBody, await self.body(request))
        return await self.answer(request, asked.chat(body, self.served))

    async def answer(self, request: Request, ask: Asked) -> Response:
        """What comes of a request, whole or as events while it comes. A client that leaves gives it up."""
        ticket, answer = self.desk.submit(ask.requests), Answer(ask, self.served)
        pieces = self.pieces(ticket, answer)
        if ask.stream:
            return Events(_events(pieces, answer), lambda: self.desk.give_up(ticket))
        try:
            await while_connected(request, _whole(pieces, answer))
        finally:
            self.desk.give_up(ticket)
        return _json(answer.whole())

    async def pieces(self, ticket: Ticket, answer: Answer) -> AsyncIterator[tuple[int, Piece]]:
        """What a ticket brings, measured."""
        start_s, first = time.perf_counter(), True
        async for index, piece in ticket:
            if first and piece.tokens:
                self.measures.first.observe(time.perf_counter() - start_s)
                first = False
            self.measures.written.inc(len(piece.tokens))
            yield index, piece
        self.measures.read.inc(answer.usage["prompt_tokens"])
        self.measures.whole.observe(time.perf_counter() - start_s)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self.served.check_name(request.path_params["name"])
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        served = self.served
        owner = {"owned_by": "megagpt", "max_model_len": served.n_places}
        return {"id": served.name, "object": "model", "created": served.created, **owner}

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize, as vLLM has it."""
        body = asked.parse(asked.TokenizeBody, await self.body(request))
        self.served.check_name(body.model)
        ids = (self.served.begun if body.add_special_tokens else self.served.encode)(body.prompt)
        return _json({"count": len(ids), "max_model_len": self.served.n_places, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize, likewise."""
        body = asked.parse(asked.DetokenizeBody, await self.body(request))
        self.served.check_name(body.model)
        self.served.needed_tokenizer()
        return _json({"prompt": self.served.decode(body.tokens)})

    async def tokenizer_info(self, request: Request) -> Response:
        """GET /tokenizer_info, likewise: what lm_eval asks for."""
        begin = self.served.needed_tokenizer().decode(self.served.bounds.begin) or None
        template = self.served.template
        specials = {"bos_token": begin, "eos_token": self.served.end_of_text, "pad_token": None}
        return _json(specials | {"chat_template": template.source if template else None})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.measures.text(), media_type=self.measures.content_type)

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while requests are taken."""
        if self.desk.stopping:
            raise ApiError(503, "the server is stopping", code="stopping")
        return _json({"status": "ok"})

    async def show_page(self, request: Request) -> Response:
        """GET /: a page to try the model in."""
        return Response(self.page, media_type="text/html", headers={"Content-Security-Policy": PAGE_MAY})

    async def body(self, request: Request) -> bytes:
        """Raises ApiError 413 where it is too long, 408 where it does not come."""
        limit, found = self.rules.max_body_bytes, bytearray()
        too_long = ApiError(413, f"the body is longer than {limit} bytes; send less", code="body_too_long")
        if int(request.headers.get("content-length", "0")) > limit:
            raise too_long
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for part in request.stream():
                    found += part
                    if len(found) > limit:
                        raise too_long
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_TIMEOUT_S:g} s; send it again") from None
        return bytes(found)


class Gate:
    """Around all paths: who may ask, what became of it, and that no error goes out but as JSON."""

    def __init__(self, app: ASGIApp, app_rules: Rules, measures: Measures, paths: set[str]) -> None:
        self.app, self.rules, self.measures, self.paths = app, app_rules, measures, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request, status = Request(scope), CLIENT_LEFT

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(request)
            await self.app(scope, receive, noted)
        except ApiError as error:
            await _error(request, error)(scope, receive, noted)
        except ClientDisconnect:
            pass
        finally:
            path = request.url.path if request.url.path in self.paths else "other"
            self.measures.requests.labels(path, status).inc()

    def _check(self, request: Request) -> None:
        """Raises ApiError 401 without the key, 403 for what a page of somebody else's asks through a browser here."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, f"got a request of a page from {origin!r:.80}; only the page of this server may ask")
        if self.rules.local and re.sub(r":\d+$", "", host) not in LOCAL_HOSTS:
            message = f"got host {host!r:.80}; this server listens for its own machine, as 127.0.0.1 or localhost"
            raise ApiError(403, message)
        if self.rules.key is None or request.url.path in OPEN_TO_ALL:
            return
        word, _, given = request.headers.get("authorization", "").partition(" ")
        # Of spaces only: a key may end in a byte that is one in Latin-1, as that of "à" is.
        same = hmac.compare_digest(given.strip(" ").encode("latin-1"), self.rules.key.encode())
        if word.lower() != "bearer" or not same:
            raise ApiError(401, "a key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key")


class Events(StreamingResponse):
    """Server-sent events. give_up: called at their end, however it comes about."""

    def __init__(self, events: AsyncIterator[bytes], give_up: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.give_up = give_up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.give_up()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What work gives; where the client leaves before, ClientDisconnect is raised and work cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(pieces: AsyncIterator[tuple[int, Piece]], answer: Answer) -> None:
    async for index, piece in pieces:
        answer.add(index, piece)


async def _events(pieces: AsyncIterator[tuple[int, Piece]], answer: Answer) -> AsyncIterator[bytes]:
    async for index, piece in pieces:
        answer.add(index, piece)
        chunk = answer.chunk(index, piece)
        if chunk is not None:
            yield _event(orjson.dumps(chunk))
    if answer.asked.usage_in_stream:
        yield _event(orjson.dumps(answer.last_chunk()))
    yield _event(b"[DONE]")


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error.body, error.status, error.headers)


def _defect(request: Request, error: Exception) -> Response:
    """A fault of ours, which uvicorn writes to stderr."""
    return _error(request, ApiError(500, "the server failed at this request; its output says where"))


def _refused(request: Request, error: Exception) -> Response:
    """What the framework refuses: an unknown path, another method."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    words = {404: f"there is no {path!r:.100} here", 405: f"{path!r:.100} does not take {method}"}
    return _error(request, ApiError(error.status_code, words.get(error.status_code, error.detail)))
