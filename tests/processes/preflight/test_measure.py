"""Measured on real ranks over gloo: every link once, and a planted slow rank or link is the one that is named."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks
from megagpt.processes.preflight import findings, measure

CPU = torch.device("cpu")
HOSTS = ["a", "a", "b", "b"]


def links_of(axis: str, pp: int, dp: int, tp: int, slow_rank: int) -> list[dict]:
    mesh = build_mesh("cpu", pp=pp, dp=dp, tp=tp)
    if dist.get_rank() == slow_rank:
        quick = dist.send
        dist.send = lambda *a, **k: (time.sleep(0.05), quick(*a, **k))  # type: ignore[assignment]
    return measure.link_speeds(mesh, axis, CPU, 1 << 16)


def test_every_link_of_an_axis_is_measured_once():
    found = run_ranks(links_of, 4, "pipe", 4, 1, 1, -1)
    assert [[link["ranks"] for link in links] for links in found] == [[[0, 1]], [[1, 2]], [[2, 3]], []]
    assert all(link["latency_s"] > 0 and link["bytes_per_s"] > 0 for links in found for link in links)
    assert run_ranks(links_of, 2, "pipe", 1, 2, 1, -1) == [[], []]  # an axis of one rank has no link


def test_a_slow_link_is_the_one_that_is_named():
    found = run_ranks(links_of, 4, "model", 1, 2, 2, 3)
    links = [{"axis": "model", **link} for links in found for link in links]
    (row,) = findings.axes_rows({}, links, HOSTS)
    assert row.state == "fail"
    assert row.finding.startswith("rank 2 (b) to rank 3 (b): ") and "rank 0 (a)" not in row.finding


def axis_and_matmul(slow_rank: int) -> tuple[dict | None, dict | None, float]:
    mesh = build_mesh("cpu", pp=1, dp=1, tp=2)
    if dist.get_rank() == slow_rank:
        quick = torch.mm
        torch.mm = lambda *a: (time.sleep(0.2), quick(*a))  # type: ignore[assignment]
    flops = measure.matmul_flops_per_s(CPU, "fp32", 64)
    return measure.axis_speed(mesh, "model", CPU, 1 << 16), measure.axis_speed(mesh, "data", CPU, 1 << 16), flops


def test_a_slow_rank_is_the_one_that_is_named():
    (model, data, fast), (_, _, slow) = run_ranks(axis_and_matmul, 2, 1)
    assert model and model["latency_s"] > 0 and model["bytes_per_s"] > 0 and data is None
    row = findings.compute_row([fast, slow], "fp32", HOSTS)
    assert row.state == "fail" and row.finding.startswith("rank 1 (a) slow: ")


def disk_on_rank(place, blind_rank: int) -> dict:
    os.environ["MASTER_PORT"] = "1"
    if dist.get_rank() == blind_rank:
        measure.SEEN_WITHIN_S = 0.2
        place = place / "elsewhere"
    return measure.try_disk(place, dist.get_rank())


def test_the_disk_is_written_by_all_and_left_clean(tmp_path):
    found = run_ranks(disk_on_rank, 2, tmp_path, -1)
    assert [f["problem"] for f in found] == [None, None]
    assert all(f["free_bytes"] > 0 and f["bytes_per_s"] > 0 for f in found)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_shared_is_found(tmp_path):
    found = run_ranks(disk_on_rank, 2, tmp_path, 1)
    assert found[0]["problem"] is None and "not shared" in found[1]["problem"]
