"""Between clients and ranks: who answers what, what is given up, how it ends; in several layouts."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from megagpt.generate import Sampling, complete
from megagpt.generate.engine import Engine
from megagpt.generate.limits import limits_for
from megagpt.generate.request import Completion, Piece, Request
from megagpt.generate.trained import load_trained
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks
from megagpt.processes.watch.watch import Watch
from megagpt.serve.api_error import ApiError
from megagpt.serve.desk import Desk
from megagpt.serve.turns import Clerk, Meeting, Worker, take_turns
from tests.serve.small_run import write_run


def request(n_samples: int = 1, n_tokens: int = 4) -> Request:
    return Request((1, 2), Sampling(n_tokens=n_tokens, n_samples=n_samples))


def test_requests_go_to_the_replica_with_least_to_do():
    async def main() -> None:
        desk = Desk(max_texts=10)
        clerk = Clerk(desk, n_replicas=2, asked_to_stop=lambda: False)
        desk.submit([request(3)])
        desk.submit([request()])
        desk.submit([request()])
        news = clerk.news()
        assert [given.replica for given in news.given] == [0, 1, 1] and clerk.loads == [3, 2]
        clerk.deliver([(0, Piece(0, i, finish="stop")) for i in range(3)])
        desk.submit([request()])
        assert [given.replica for given in clerk.news().given] == [0] and clerk.loads == [1, 2]

    asyncio.run(main())


def test_a_full_desk_says_when_to_come_again():
    async def main() -> None:
        desk = Desk(max_texts=3)
        clerk = Clerk(desk, 1, lambda: False)
        ticket = desk.submit([request(2)])
        with pytest.raises(ApiError, match="2 texts wait or are being written, of 3 at most") as failed:
            desk.submit([request(2)])
        assert failed.value.status == 429 and failed.value.headers == {"Retry-After": "1"}
        desk.submit([request(1)])
        desk.give_up(ticket)
        desk.submit([request(2)])
        news = clerk.news()
        assert [given.key for given in news.given] == [0, 1, 2] and news.given_up == (0,) and clerk.loads == [3]

    asyncio.run(main())


def test_nothing_that_was_taken_is_lost_when_it_stops():
    async def main() -> None:
        stopping = False
        desk = Desk(max_texts=10)
        clerk = Clerk(desk, 1, lambda: stopping)
        ticket = desk.submit([request(), request()])
        stopping = True
        news = clerk.news()
        assert [given.key for given in news.given] == [0, 1] and not news.ends
        with pytest.raises(ApiError) as failed:
            desk.submit([request()])
        assert failed.value.status == 503
        clerk.deliver([(0, Piece(0, 0, (7,), finish="length"))])
        assert not clerk.news().ends
        clerk.deliver([(1, Piece(1, 0, (8,), finish="length"))])
        assert clerk.news().ends
        await asyncio.sleep(0)  # the desk hands out
        assert [(index, piece.tokens) async for index, piece in ticket] == [(0, (7,)), (1, (8,))]

    asyncio.run(main())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return write_run(tmp_path_factory.mktemp("run"))


PROMPTS = [[3, 14, 15, 92, 65], [35], [89, 79, 3, 23, 84, 62, 64, 33], [5, 0]]
SAMPLING = Sampling(n_tokens=9, n_samples=2, temperature=1.0, top_k=0)


async def _ask(desk: Desk, i: int, prompt: list[int]) -> list[Completion]:
    """A client, who comes when others are at it."""
    await asyncio.sleep(0.02 * i)
    found = [Completion(), Completion()]
    async for index, piece in desk.submit([Request(tuple(prompt), replace(SAMPLING, seed=i))]):
        found[index].add(piece)
    return found


async def _leave(desk: Desk) -> None:
    """A client who asks for much and goes after the first token."""
    ticket = desk.submit([Request((1,), Sampling(n_tokens=60, n_samples=3))])
    async for _ in ticket:
        break
    desk.give_up(ticket)


def _serve(run: str, tp: int, pp: int, dp: int) -> tuple[list[list[Completion]] | None, int]:
    """On a rank: what clients of rank 0 got, and the rows that are still in use."""
    mesh = build_mesh("cpu", pp=pp, dp=dp, tp=tp)
    trained = load_trained(run, mesh)
    engine = Engine(trained.stage, limits_for(trained.stage, n_rows=4), trained.tokenizer)
    worker, meeting = Worker(engine, mesh.data.rank), Meeting(mesh)
    if mesh.rank:
        take_turns(worker, meeting, Watch(), None)
        return None, len(engine.batching)
    desk, done = Desk(100), []
    clerk = Clerk(desk, dp, lambda: bool(done))

    async def clients() -> list[list[Completion]]:
        turns = asyncio.get_running_loop().run_in_executor(None, take_turns, worker, meeting, Watch(), clerk)
        *texts, _ = await asyncio.gather(*(_ask(desk, i, p) for i, p in enumerate(PROMPTS)), _leave(desk))
        done.append(True)
        await turns
        assert clerk.loads == [0] * dp and desk.n_texts == 0
        return texts

    return asyncio.run(clients()), len(engine.batching)


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2)])
def test_every_layout_gives_each_client_what_it_gets_alone(run: str, tp: int, pp: int, dp: int):
    (texts, _), *others = results = run_ranks(_serve, tp * pp * dp, run, tp, pp, dp)
    assert all(found is None for found, _ in others)
    assert texts == run_ranks(_alone, 1, run)[0]
    if pp == 1:  # a pipeline is left with the pass that is under way
        assert [n_rows for _, n_rows in results] == [0] * len(results)


def _alone(run: str) -> list[list[Completion]]:
    """What `complete` gives to each prompt."""
    trained = load_trained(run, build_mesh("cpu", pp=1, dp=1, tp=1))
    return complete(trained.stage, trained.tokenizer, PROMPTS, SAMPLING, limits=limits_for(trained.stage, n_rows=1))
