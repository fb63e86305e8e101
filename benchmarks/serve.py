"""A server asked by many clients at once beside one after the other: the same requests, in turn, in one run.

    python -m benchmarks.serve                                64 clients, the tiny model of benchmarks/generate.py
    python -m benchmarks.serve --shape 124M --rounds 1
    python -m benchmarks.serve --json benchmarks/results/serve-here.json

The server is a process of its own; clients are threads of this one, each with a connection and a request: prompts of 1
to 64 tokens, 8 to 96 to write, all by ids, half of them greedy. Every answer must be what the request gets alone.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.generate import SHAPES
from benchmarks.machine import conditions, headline
from megagpt.config import RunConfig
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.generate.stage import build_stage
from megagpt.generate.trained import Trained
from megagpt.parallel.mesh import single_process_mesh
from megagpt.processes.watch.watch import Watch
from megagpt.serve.server import Settings, answer, open_door

N_PROMPT, N_WRITTEN = (1, 64), (8, 96)


@dataclass(frozen=True)
class Round:
    """Seconds that all requests took: one after the other, and at once. wait_s: to an answer, the median at once."""

    in_turn_s: float
    at_once_s: float
    wait_s: float


def main() -> None:
    """Measure, print, and write the figures where --json says."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--clients", type=int, default=64, help="at once (default: 64)")
    parser.add_argument("--batch", type=int, default=16, help="texts that the server writes at once (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="of both ways, in turn (default: 3)")
    parser.add_argument("--threads", type=int, help="of the server (default: torch's own choice)")
    parser.add_argument("--json", type=Path, help="where the figures go")
    a = parser.parse_args()
    bodies = requests(a.clients, SHAPES[a.shape].vocab)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(a.shape, a.batch, a.clients, a.threads, theirs), daemon=True)
    server.start()
    theirs.close()  # so that a server that fails is heard of
    address = ours.recv()
    measured(address, bodies[: a.batch])  # what happens once
    rounds = [measured(address, bodies) for _ in range(a.rounds)]
    ours.send("stop")
    server.join()
    n_tokens = sum(json.loads(body)["max_tokens"] for body in bodies)
    report = conditions("benchmarks.serve", "cpu") | {"shape": a.shape, "clients": a.clients, "batch": a.batch}
    report |= {"threads": a.threads, "tokens": n_tokens, "rounds": [asdict(found) for found in rounds]}
    report["ratio"] = statistics.median(found.in_turn_s / found.at_once_s for found in rounds)
    print(headline(report))
    for found in rounds:
        in_turn, at_once = n_tokens / found.in_turn_s, n_tokens / found.at_once_s
        print(f"tokens/s: {in_turn:8.0f} in turn, {at_once:8.0f} at once; answer after {found.wait_s:.2f} s (median)")
    print(f"{a.clients} at once are {report['ratio']:.1f} times as fast; all answers equal")
    if a.json:
        a.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def requests(n: int, vocab_size: int) -> list[bytes]:
    """A mix of lengths, greedy and drawn, the same in every run."""
    draw = random.Random(0)
    return [
        json.dumps(
            {
                "prompt": [draw.randrange(vocab_size) for _ in range(draw.randint(*N_PROMPT))],
                "max_tokens": draw.randint(*N_WRITTEN),
                "temperature": i % 2,
                "seed": i,
            }
        ).encode()
        for i in range(n)
    ]


def serve(shape: str, batch: int, clients: int, n_threads: int | None, pipe: Connection) -> None:
    """The server's process: tells its address, and ends when it is told something."""
    if n_threads:
        torch.set_num_threads(n_threads)
    config, settings = SHAPES[shape], Settings(load=shape, port=0, batch=batch, max_waiting=clients)
    trained = Trained(build_stage(config, single_process_mesh()), RunConfig(model=config), None, Path(shape), 0)
    door = open_door(settings)
    pipe.send(door.address.removeprefix("http://"))
    answer(settings, trained, None, door, Watch(), pipe.poll)


def measured(address: str, bodies: Sequence[bytes]) -> Round:
    """All requests one after the other, then all at once.  Raises UserError where an answer is another one then."""
    start = time.perf_counter()
    alone = [ask(address, body) for body in bodies]
    middle = time.perf_counter()
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: ask(address, body), bodies))
    end = time.perf_counter()
    for i, ((text, _), (other, _)) in enumerate(zip(alone, together, strict=True)):
        if text != other:
            raise UserError(f"request {i} got {other}, alone {text}")
    return Round(middle - start, end - middle, statistics.median(wait_s for _, wait_s in together))


def ask(address: str, body: bytes) -> tuple[Any, float]:
    """Token ids of the answer, and the seconds until it was there."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection(address, timeout=600)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    found = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise UserError(f"status {response.status}: {found}")
    return found["choices"][0]["token_ids"], time.perf_counter() - start


if __name__ == "__main__":
    run_cli(main)
