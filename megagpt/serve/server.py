"""From settings to a server: what can fail at once is tried first; then a model on all ranks, and HTTP on rank 0."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import uvicorn

from megagpt.checkpoint.strict import STRICT, Allowed
from megagpt.config import DataConfig
from megagpt.errors import UserError, announce, require
from megagpt.files import os_reason
from megagpt.generate.engine import Engine
from megagpt.generate.limits import ROWS, Limits, described, limits_for
from megagpt.generate.trained import Trained, Weights, laid_out, load_trained
from megagpt.processes.agree import together
from megagpt.processes.stopping import Stopper
from megagpt.processes.watch.limits import Limits as WatchLimits
from megagpt.processes.watch.watch import Watch
from megagpt.serve.app import App, Rules
from megagpt.serve.chat import ChatTemplate, template_beside
from megagpt.serve.desk import Desk
from megagpt.serve.measures import Measures
from megagpt.serve.served import Served
from megagpt.serve.turns import Clerk, Meeting, Worker, take_turns

LAST_ANSWERS_S = 10  # what clients may take to read them, before a server that stops closes their connections


@dataclass(frozen=True)
class Settings:
    """What the command is given; `examples/serve.py --help` explains each."""

    load: str
    load_fallback: bool = False
    weights: Weights = "last"
    allowed: Allowed = STRICT
    tokenizer: DataConfig | None = None
    pp: int = 1
    dp: int = 1
    precision: str = "fp32"
    batch: int = ROWS
    max_waiting: int = 256
    max_body_kib: int = 1024
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key_file: str | None = None

    def check(self) -> None:
        """Raises UserError for what cannot be."""
        for name, least in (("batch", 1), ("max_waiting", 0), ("max_body_kib", 1), ("port", 0)):
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
            require(value >= least, f"got {flag} {value}", f"wanted {least} or more", f"change {flag}")
        require(self.port < 2**16, f"got --port {self.port}", "wanted at most 65535", "change --port")


FLAGS = {field.name for field in fields(Settings)} - {"allowed", "tokenizer"}
"""Settings that are flags by themselves."""


def serve(settings: Settings) -> None:
    """Answer clients until a signal asks to stop; then finish what is under way, and return.

    Comm: collective over the processes that were started.  Raises UserError as `open_trained` does, and where the port
    is taken or the key cannot be read.
    """
    settings.check()
    # A replica with less to do than others is no fault: no rank is called slow.
    with laid_out(pp=settings.pp, dp=settings.dp, limits=WatchLimits(slow_rank_factor=0)) as (mesh, watch):
        door = together(lambda: open_door(settings) if mesh.rank == 0 else None)
        trained = load_trained(
            settings.load,
            mesh,
            settings.load_fallback,
            settings.weights,
            settings.allowed,
            settings.tokenizer,
            precision=settings.precision,
        )
        template = together(lambda: template_beside(trained.tokenizer.files) if trained.tokenizer else None)
        with Stopper(None) as stopper:
            answer(settings, trained, template, door, watch, lambda: stopper.asked)


def answer(
    settings: Settings,
    trained: Trained,
    template: ChatTemplate | None,
    door: Door | None,
    watch: Watch,
    asked_to_stop: Callable[[], bool],
) -> None:
    """Answer clients with a model that is open, until rank 0 is asked to stop.  door: rank 0's.  Comm: `take_turns`."""
    mesh, limits = trained.mesh, limits_for(trained.stage, n_rows=settings.batch)
    worker, meeting = Worker(Engine(trained.stage, limits, trained.tokenizer), mesh.data.rank), Meeting(mesh)
    if door is None:
        return take_turns(worker, meeting, watch, None)
    desk = Desk(limits.n_rows * mesh.data.size + settings.max_waiting)
    clerk = Clerk(desk, mesh.data.size, asked_to_stop)
    served = Served(
        name=settings.name or Path(settings.load).resolve().name,
        tokenizer=trained.tokenizer,
        vocab_size=trained.config.model.vocab,
        n_places=limits.n_places,
        max_texts=desk.max_texts,
        template=template,
        created=int(time.time()),
        bounds=trained.bounds,
    )
    front = Front(App(served, desk, measures(desk, clerk, limits), door.rules), door.listener, desk)
    front.start()
    announce(described(trained.stage, limits))
    announce(f"{served.name} listens on {door.address}")
    take_turns(worker, meeting, watch, clerk)
    front.finish()


@dataclass(frozen=True)
class Door:
    """What can be had before a model is loaded: a socket that listens, and the rules of who may ask."""

    listener: socket.socket
    rules: Rules

    @property
    def address(self) -> str:
        """As a browser takes it."""
        host, port = self.listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def open_door(settings: Settings) -> Door:
    """Raises UserError where the key cannot be read or nobody can listen there."""
    key = None
    if settings.api_key_file is not None:
        try:
            key = Path(settings.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            why = os_reason(error) if isinstance(error, OSError) else "not UTF-8"
            raise UserError(
                f"--api-key-file {settings.api_key_file} cannot be read ({why})", remedy="name another"
            ) from None
        require(bool(key), f"{settings.api_key_file} is empty;", "wanted a key", "write one into it")
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        where, why = f"--host {settings.host} --port {settings.port}", os_reason(error).partition(" (")[0]
        raise UserError(f"cannot listen on {where}: {why}", remedy="name others") from None
    local = listener.getsockname()[0] in ("127.0.0.1", "::1")
    return Door(listener, Rules(key, settings.max_body_kib * 1024, local))


def measures(desk: Desk, clerk: Clerk, limits: Limits) -> Measures:
    """What is counted, and what is looked up."""

    def waiting() -> int:
        return sum(max(0, load - limits.n_rows) for load in clerk.loads)

    return Measures(
        {
            "megagpt_texts_running": ("Texts that are being written", lambda: sum(clerk.loads) - waiting()),
            "megagpt_texts_waiting": ("Texts that wait for a place", waiting),
            "megagpt_texts_limit": ("Texts that may run and wait at once", lambda: desk.max_texts),
        }
    )


class Front(threading.Thread):
    """HTTP, in a thread of rank 0. If it ended by itself, the server would stop."""

    def __init__(self, app: App, listener: socket.socket, desk: Desk) -> None:
        super().__init__(name="http", daemon=True)
        config = uvicorn.Config(
            app.asgi(),
            http="h11",  # which tells at once that a client has left
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_ANSWERS_S,
        )
        self._server, self._listener, self._desk = uvicorn.Server(config), listener, desk

    def run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._desk.stop()

    def finish(self) -> None:
        """Wait until the last answers are read, LAST_ANSWERS_S at most."""
        self._server.should_exit = True
        self.join()
