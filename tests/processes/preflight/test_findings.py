"""Every verdict, from figures alone: what is fine is ok, what is wrong is named, with its host and a remedy."""

from __future__ import annotations

import dataclasses

import pytest

from megagpt.config import CheckpointConfig, RunConfig, TrainConfig
from megagpt.processes.preflight.facts import Facts
from megagpt.processes.preflight.findings import (
    Row,
    alike_rows,
    axes_rows,
    binary,
    checkpoints_kept,
    clocks_row,
    compute_row,
    disk_rows,
    hosts_row,
    limits_row,
    memory_row,
    rate,
    slowness,
)

HOSTS = ["a", "a", "b", "b"]
GIB = 2**30


def facts(rank: int, **changes) -> Facts:
    """A rank with which nothing is wrong."""
    versions = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "megagpt": "abc", "GPU": "H200"}
    fine = Facts(
        rank=rank, host=HOSTS[rank], device="cpu", versions=versions, settings={"parallel.tp": "2"},
        data={"d.idx": "123"} if rank % 2 == 0 else {}, memory_free=8 * GIB, memory_needed=GIB,
        checkpoint_bytes=GIB, open_files=65536, problem=None,
    )  # fmt: skip
    return dataclasses.replace(fine, **changes)


def four(rank: int | None = None, **changes) -> list[Facts]:
    """Four of them, one changed."""
    return [facts(r, **(changes if r == rank else {})) for r in range(4)]


def alike(found: list[Facts]) -> dict[str, Row]:
    return {row.check: row for row in alike_rows(found)}


def test_equal_ranks_are_fine():
    rows = [*alike_rows(four()), memory_row(four()), limits_row(four()), hosts_row(HOSTS, {}, {})]
    assert {row.state for row in rows} == {"ok"}
    assert not any(row.remedy for row in rows)


def test_another_version_is_named_with_its_ranks_and_host():
    newer = {**facts(3).versions, "torch": "2.14.0"}
    row = alike(four(3, versions=newer))["versions"]
    assert row.state == "fail"
    assert row.finding == "torch is 2.13.0 on ranks 0-2 (a, b), 2.14.0 on rank 3 (b)"
    assert "constraints.txt" in row.remedy


def test_another_gpu_works_but_is_told():
    row = alike(four(1, versions={**facts(1).versions, "GPU": "A100"}))["versions"]
    assert (row.state, row.finding) == ("warn", "GPU is H200 on ranks 0, 2-3 (a, b), A100 on rank 1 (a)")


def test_another_flag_is_named():
    row = alike(four(2, settings={"parallel.tp": "1"}))["settings"]
    assert row.state == "fail" and "parallel.tp is 2 on ranks 0-1, 3 (a, b), 1 on rank 2 (b)" in row.finding


def test_other_data_on_a_host_fails():
    row = alike(four(2, data={"d.idx": "666"}))["data"]
    assert row.state == "fail" and row.finding == "d.idx is 123 on rank 0 (a), 666 on rank 1 (b)"


def test_data_that_one_rank_cannot_read_fails_with_its_remedy():
    row = alike(four(3, problem="d.idx: cut short; copy it again"))["data"]
    assert row == Row("data", "fail", "rank 3 (b): d.idx: cut short", "copy it again")


@pytest.mark.parametrize(("free", "state"), [(0.5, "fail"), (1.1, "warn"), (1.3, "ok")])
def test_memory_against_the_plan(free: float, state: str):
    row = memory_row(four(2, memory_free=int(free * GIB)))
    assert row.state == state
    assert state == "ok" or ("rank 2 (b) needs 1.0 GiB" in row.finding and "--tp" in row.remedy)


def test_few_open_files_are_a_warning():
    assert limits_row(four(1, open_files=1024)) == Row(
        "open files",
        "warn",
        "rank 1 (a): at most 1024",
        "`ulimit -n 65536` before the start, or LimitNOFILE of the service",
    )


def test_hosts_that_do_not_reach_each_other_are_named():
    row = hosts_row(HOSTS, {}, {0: [2], 1: [3], 2: [], 3: []})
    assert row.state == "fail" and row.finding == "a cannot connect to b"
    row = hosts_row(HOSTS, {2: "GLOO_SOCKET_IFNAME=x is no interface; set it"}, {0: [2]})
    assert row == Row("hosts", "fail", "rank 2 (b): GLOO_SOCKET_IFNAME=x is no interface", "set it")


def disk(n: int = 4, **changes) -> list[dict]:
    return [{"problem": None, "free_bytes": 10 * GIB, "bytes_per_s": 1e9, **changes} for _ in range(n)]


def saving(**keep) -> RunConfig:
    return RunConfig(train=TrainConfig(train_steps=100), checkpoint=CheckpointConfig(save="r", **keep))


def test_a_run_folder_that_is_not_shared_fails():
    found = [*disk(2), *disk(2, problem="cannot see there what rank 0 has written: it is not shared")]
    (row,) = disk_rows(found, saving(), "/r", GIB, HOSTS)
    assert row.state == "fail" and "ranks 2-3 (b) cannot see" in row.finding and "--save" in row.remedy


def test_a_folder_that_rank_0_cannot_write_is_told_once():
    found = disk(4, problem="does not see it")
    found[0]["problem"] = "cannot write there (Read-only file system)"
    (row,) = disk_rows(found, saving(), "/r", GIB, HOSTS)
    assert row.finding == "/r: rank 0 (a) cannot write there (Read-only file system)"


@pytest.mark.parametrize(
    ("keep", "free", "state"), [({}, 0.5, "fail"), ({"save_interval": 5}, 10, "warn"), ({}, 2, "ok")]
)
def test_space_for_the_checkpoints_that_are_kept(keep: dict, free: float, state: str):
    rows = {r.check: r for r in disk_rows(disk(free_bytes=int(free * GIB)), saving(**keep), "/r", GIB, HOSTS)}
    assert rows["disk space"].state == state
    assert rows["disk speed"].finding.startswith("4 GB/s by all ranks at once: a checkpoint takes about 0.3 s")


def test_checkpoints_kept():
    assert checkpoints_kept(saving()) == 1
    assert checkpoints_kept(saving(save_interval=10)) == 10
    assert checkpoints_kept(saving(save_interval=30)) == 4
    assert checkpoints_kept(saving(save_interval=10, keep_last=2)) == 3
    assert checkpoints_kept(saving(save_interval=10, keep_last=2, keep_every=50, keep_best=True)) == 6


def test_a_clock_that_is_off_is_named():
    assert clocks_row([100.0, 100.001, 100.0, 100.002], HOSTS).finding == "within 2 ms"
    row = clocks_row([100.0, 100.0, 100.0, 160.0], HOSTS)
    assert row.state == "warn" and "rank 3 (b) up to 60.0 s off" in row.finding


def test_a_slow_rank_is_named():
    assert compute_row([1e12, 1.1e12, 0.9e12, 1e12], "bf16", HOSTS).state == "ok"
    row = compute_row([1e12, 1e12, 0.5e12, 1e12], "bf16", HOSTS)
    assert row.state == "warn" and "rank 2 (b) slow: rank 2 does 500 GFLOP/s, the others 1 TFLOP/s" in row.finding
    assert compute_row([1e12, 1e12, 0.1e12, 1e12], "bf16", HOSTS).state == "fail"
    assert compute_row([1e12], "bf16", HOSTS).state == "ok"  # nothing to compare with


def link(a: int, b: int, bytes_per_s: float = 1e10, latency_s: float = 2e-5, axis: str = "data") -> dict:
    return {"axis": axis, "ranks": [a, b], "bytes_per_s": bytes_per_s, "latency_s": latency_s}


def test_a_slow_link_is_named_beside_its_own_kind():
    """The links between hosts are all 10 times slower than those within: that is their kind, and no fault."""
    between = [link(0, 2, 1e9), link(1, 3, 1e9)]
    within = [link(0, 1, axis="model"), link(2, 3, axis="model")]
    assert [row.state for row in axes_rows({}, [*between, *within], HOSTS)] == ["ok", "ok"]
    model, data = axes_rows({}, [link(0, 2, 1e9), link(1, 3, 0.3e9), *within], HOSTS)
    assert (model.state, data.state) == ("ok", "warn")
    assert data.finding.startswith("rank 1 (a) to rank 3 (b): 300 MB/s, 0.02 ms, others of its kind 1 GB/s")
    assert "cable" in data.remedy
    model, _ = axes_rows({}, [*between, within[0], link(2, 3, 1e9, axis="model")], HOSTS)
    assert model.state == "fail" and "rank 2 (b) to rank 3 (b)" in model.finding and "topo" in model.remedy


def test_a_late_link_is_named_although_its_bandwidth_is_fine():
    (row,) = axes_rows({}, [link(0, 2), link(1, 3, latency_s=2e-2)], HOSTS)
    assert row.state == "fail" and "rank 1 (a) to rank 3 (b): 10 GB/s, 20 ms" in row.finding


def test_tensor_parallelism_between_hosts_is_a_warning():
    figures = [{"latency_s": 1e-4, "bytes_per_s": 5e9}] * 4
    (row,) = axes_rows({"model": figures}, [link(1, 2, axis="model")], HOSTS)
    assert row.state == "warn" and "from host to host" in row.finding and "--tp" in row.remedy
    assert "all-reduce 5 GB/s (bus), 0.1 ms" in row.finding


def test_slowness_and_units():
    assert slowness([4.0, 1.0, 4.0]) == [2.5 / 4, 4.0, 2.5 / 4]
    assert [binary(3 * GIB), binary(2**20 * 1.5), binary(100)] == ["3.0 GiB", "1.5 MiB", "0.1 KiB"]
    assert [rate(2.5e9, "B/s"), rate(500, "B/s")] == ["2.5 GB/s", "0.5 kB/s"]
