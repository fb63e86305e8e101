"""Ranks that meet at a store which older ranks have used: as torchrun's restarts do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megagpt.processes.agree import RankError
from megagpt.processes.rendezvous import meet

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
