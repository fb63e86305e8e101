"""A server in threads of the test's own process, and the same texts without one."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megagpt.generate.trained import Trained, laid_out, load_trained
from megagpt.processes.watch.watch import Watch
from megagpt.serve.chat import ChatTemplate
from megagpt.serve.server import Settings, answer, open_door

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Serving:
    """stop: what SIGTERM would do."""

    address: str
    stop: threading.Event


@contextmanager
def opened(run: str) -> Iterator[Trained]:
    """A model in this process; several servers may use it."""
    with laid_out(pp=1, dp=1) as (mesh, _):
        yield load_trained(run, mesh)


@contextmanager
def serving(trained: Trained, **settings: Any) -> Iterator[Serving]:
    """A server that ends with the block; its port is a free one."""
    stop, given = threading.Event(), Settings(load="small", port=0, **settings)
    door = open_door(given)
    arguments = (given, trained, ChatTemplate(CHATML, {}), door, Watch(), stop.is_set)
    thread = threading.Thread(target=answer, args=arguments, daemon=True)
    thread.start()
    yield Serving(door.address, stop)
    stop.set()
    thread.join(30)
    assert not thread.is_alive(), "the server has not ended"


def ask(url: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of an answer. body: sent as JSON, bytes as they are."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {k.replace("_", "-"): v for k, v in headers.items()}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), _read(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), _read(error.read())


def _read(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode()
