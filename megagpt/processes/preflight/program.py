"""The program behind tools/preflight.py: what can be asked over the store first, then what needs a connected mesh.

So that ranks which differ, or cannot reach each other, get a verdict and not a hang.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.table import Table

from megagpt.config import RunConfig
from megagpt.console import console_here, show
from megagpt.errors import UserError
from megagpt.files import json_text, os_reason
from megagpt.parallel.mesh import Mesh
from megagpt.processes.agree import RankError
from megagpt.processes.preflight import facts, findings, measure, reach
from megagpt.processes.preflight.findings import Row
from megagpt.processes.preflight.reach import Board
from megagpt.processes.rendezvous import open_store
from megagpt.processes.start import distributed
from megagpt.processes.watch.limits import Limits

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def preflight(config: RunConfig, json_path: Path | None, timeout_s: float) -> None:
    """Check everything, print a table on rank 0, write the JSON.

    timeout_s: how long ranks wait for each other. Raises UserError (exit code 2) on every rank when a check fails;
    rank 0 speaks.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    board = Board(open_store(rank, timeout_s), rank, world_size, timeout_s)
    known, rows = _unconnected(board, config)
    figures: dict[str, Any] = {}
    if board.share("go on", not any(row.state == "fail" for row in rows)):
        pp, tp = config.parallel.pp, config.parallel.tp
        with distributed(pp=pp, dp=world_size // (pp * tp), tp=tp, limits=Limits(progress_timeout_s=timeout_s)) as (
            mesh,
            _,
        ):
            more, figures = _connected(board, config, mesh, known)
        rows += more
    failed = board.share("failed", [row.check for row in rows if row.state == "fail"])
    board.gather("read", True)  # the store goes with rank 0
    if rank == 0:
        _show(rows)
        if json_path:
            _write(json_path, rows, known, figures)
    if failed:
        raise RankError(f"preflight failed: {', '.join(failed)}; each row says what to do", speaks=rank == 0)


def _unconnected(board: Board, config: RunConfig) -> tuple[list[facts.Facts], list[Row]]:
    """What needs nothing but the store; facts and rows on rank 0, nothing on the others."""
    hosts = board.share("hosts", board.gather("host", socket.gethostname()))
    n_hosts, host = len(set(hosts)), hosts[board.rank]
    address = reach.own_address("nccl" if torch.cuda.is_available() else "gloo", n_hosts)
    with reach.listen(address.ip) as listener:
        port = listener.getsockname()[1]
        place = {"host": host, "ip": address.ip, "port": port, "problem": address.problem}
        places = board.share("places", board.gather("place", place))
        unreached = board.gather("unreached", reach.unreachable(board.rank, places))
        board.share("all have tried")  # until then each listens
    reads_data = hosts.index(host) == board.rank
    own = facts.collect(config, board.rank, board.world_size, hosts.count(host), reads_data)
    found = [facts.Facts(**each) for each in board.gather("facts", dataclasses.asdict(own))]
    if board.rank != 0:
        return [], []
    problems = {rank: place["problem"] for rank, place in enumerate(places) if place["problem"]}
    rows = [findings.hosts_row(hosts, problems, dict(enumerate(unreached))), *findings.alike_rows(found)]
    if found[0].memory_needed:
        rows.append(findings.memory_row(found))
    return found, [*rows, findings.limits_row(found)]


def _connected(
    board: Board, config: RunConfig, mesh: Mesh, known: list[facts.Facts]
) -> tuple[list[Row], dict[str, Any]]:
    """What is measured between connected ranks; rows and figures on rank 0, nothing on the others."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    sizes = measure.Sizes.of(device)
    flops = board.gather("flops", measure.matmul_flops_per_s(device, config.train.precision, sizes.matmul_width))
    groups, links = {}, []
    for axis in findings.AXES:
        if axis != "pipe":  # stages only send and receive
            groups[axis] = board.gather(f"group {axis}", measure.axis_speed(mesh, axis, device, sizes.message_bytes))
        for own in board.gather(f"links {axis}", measure.link_speeds(mesh, axis, device, sizes.message_bytes)):
            links += [{"axis": axis, **link} for link in own]
    place = Path(board.share("place on disk", str(measure.place_to_probe(config))))
    written = board.gather("disk", measure.try_disk(place, board.rank))
    dist.barrier()
    clocks = board.gather("clock", time.time())
    if board.rank != 0:
        return [], {}
    hosts = [f.host for f in known]
    rows = [findings.compute_row(flops, config.train.precision, hosts)]
    rows += findings.axes_rows(groups, links, hosts)
    rows += findings.disk_rows(written, config, str(place), known[0].checkpoint_bytes, hosts)
    rows.append(findings.clocks_row(clocks, hosts))
    return rows, {"flops_per_s": flops, "groups": groups, "links": links, "disk": written, "clocks_s": clocks}


def _show(rows: list[Row]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="preflight", title_justify="left")
    table.add_column("check", no_wrap=True, style="cyan")
    table.add_column("")
    table.add_column("found")
    for row in rows:
        found = row.finding + (f"\n→ {row.remedy}" if row.remedy else "")
        table.add_row(row.check, f"[{COLOURS[row.state]}]{row.state}[/]", found)
    show(console_here(), table)


def _write(path: Path, rows: list[Row], known: list[facts.Facts], figures: dict[str, Any]) -> None:
    result = {
        "command": shlex.join(sys.argv),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "rows": [dataclasses.asdict(row) for row in rows],
        "ranks": [dataclasses.asdict(f) for f in known],
        "measured": figures,
    }
    try:
        path.write_text(json_text(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path} ({os_reason(error)}); give another --json") from None


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
