"""Ranks that meet at a store which older ranks have used: as torchrun's restarts do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megagpt.errors import EXIT_PEER_LOST
from megagpt.processes import rendezvous
from megagpt.processes.agree import RankError
from megagpt.processes.rendezvous import ARRIVED, LOOKED, MEETING, meet, open_store

N_RANKS = 3


@pytest.fixture
def agent(monkeypatch) -> dist.TCPStore:
    """A store that outlives the ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def come(rank: int, generation: int, timeout_s: float = 20.0) -> tuple[dist.Store, list[str]]:
    """One rank of a generation."""
    return meet(rank, N_RANKS, timeout_s, lambda r: f"rank {r}", f"host {rank} of {generation}")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_each_start_sees_its_own_ranks_alone(agent, order):
    for generation in range(3):
        with ThreadPoolExecutor(N_RANKS) as pool:
            futures = {rank: pool.submit(come, rank, generation) for rank in order}
            stores = {}
            for rank, future in futures.items():
                stores[rank], hosts = future.result()
                assert hosts == [f"host {r} of {generation}" for r in range(N_RANKS)]
        assert not any(store.check(["address"]) for store in stores.values()), "that of the generation before"
        stores[0].set("address", str(generation))
        assert [store.get("address").decode() for store in stores.values()] == [str(generation)] * N_RANKS


def test_who_did_not_come_is_named_though_it_came_the_last_time(agent):
    with ThreadPoolExecutor(N_RANKS) as pool:
        list(pool.map(come, range(N_RANKS), [0] * N_RANKS))
        with pytest.raises(RankError, match=r"2 of 3 processes came within 4 s; missing: rank 1; "):
            list(pool.map(come, (0, 2), (1, 1), (4.0, 4.0)))
        with pytest.raises(RankError, match=r"rank 0 did not come within 1 s; see its output"):
            list(pool.map(come, (1, 2), (2, 2), (1.0, 1.0)))


def test_who_comes_and_ends_is_named_before_the_time_is_up(agent, monkeypatch):
    monkeypatch.setattr(rendezvous, "GONE_S", 1.0)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(come, 0, 0, 600.0)
        while not agent.check([MEETING]):
            pass
        meeting = dist.PrefixStore(agent.get(MEETING).decode(), agent)
        meeting.add(LOOKED.format(2), 1)  # rank 2 comes, and looks no second time; rank 1 never comes
        meeting.set(ARRIVED.format(2), "[]")
        with pytest.raises(RankError, match=r"rank 2 came and ended before all had come; see its output") as told:
            first.result(60.0)
    assert told.value.code == EXIT_PEER_LOST


def test_a_long_wait_is_said_again_and_again(agent, monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "NOTE_S", 0.5)
    with ThreadPoolExecutor(2) as pool, pytest.raises(RankError):
        list(pool.map(come, (0, 1), (0, 0), (1.6, 1.6)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"still waiting for rank 2; {seconds} of 1.6 s are over" for seconds in (0.5, 1)]


@pytest.mark.parametrize("name", ["no.such.host.invalid", "a" * 70 + ".invalid"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_nobody_knows_is_told(name, rank, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", name)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "RESOLVE_S", 0.0)
    with pytest.raises(RankError, match=rf"MASTER_ADDR={name} is no host that .* knows \(.+\); give the name") as told:
        open_store(rank, 600.0)
    assert told.value.code == EXIT_PEER_LOST
