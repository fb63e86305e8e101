"""The parts of the watch, one by one; what they do together with real ranks: tests/train/test_faults_ranks.py."""

from __future__ import annotations

import io
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import c10d_logger

from megagpt.processes.local import run_ranks
from megagpt.processes.watch.call_site import Activity, CallSite, call_site, enqueued, waits_for
from megagpt.processes.watch.limits import Limits
from megagpt.processes.watch.machine import machine_id, process_state
from megagpt.processes.watch.slow import N_WINDOWS, SlowRanks, Work
from megagpt.processes.watch.verdict import RankView, culprits, describe, needs
from megagpt.processes.watch.watch import Watch, WatchThread
from megagpt.processes.watch.wire import MAX_LINE_BYTES, Circle, Wire

# Whom to blame


def view(rank: int, collective: str | None = None, waits_for: list[int] | None = None, **more: Any) -> RankView:
    wanted = needs(rank, collective, waits_for) if waits_for else ()
    return RankView(rank, f"rank {rank}", collective=collective, waits_for=wanted, place="a.py:1 f", **more)


BLAMED = {
    "the busy one": ([view(0, "all_reduce", [1, 2]), view(1), view(2, "all_reduce", [0, 1])], [1]),
    "the dead one, whoever waits": ([view(0, "recv", [1]), view(1), view(2, state="died")], [2]),
    "all that are silent": ([view(0), view(1, state="silent"), view(2, state="stopped")], [1, 2]),
    "the last of a chain": ([view(0, "recv", [1]), view(1, "all_reduce", [2]), view(2)], [2]),
    "the one that sends to nobody who receives": ([view(0, "recv", [1]), view(1, "send", [2]), view(2)], [2]),
    "nobody, in one collective": ([view(0, "all_reduce", [1]), view(1, "all_reduce", [0])], []),
    "nobody, sending and receiving": ([view(0, "send", [1]), view(1, "recv", [0])], []),
    "both, in two collectives": ([view(0, "all_reduce", [1]), view(1, "broadcast", [0]), view(2)], [0, 1]),
    "both, both receiving": ([view(0, "recv", [1]), view(1, "recv", [0])], [0, 1]),
    "a circle, not who waits behind it": (
        [view(0, "recv", [1]), view(1, "recv", [2]), view(2, "recv", [1]), view(3, "all_reduce", [0])],
        [1, 2],
    ),
    "who has ended": ([view(0, "barrier", [1, 2]), view(1, state="left"), view(2, "barrier", [0, 1])], [1]),
}


@pytest.mark.parametrize("name", BLAMED)
def test_the_blame_falls_on(name):
    ranks, expected = BLAMED[name]
    assert [r.rank for r in culprits(ranks)] == expected


def test_a_message_stays_one_readable_line_with_many_ranks():
    ranks = [view(r, "all_reduce", list(range(64)), host="a") for r in range(60)]
    ranks += [view(r, state="died", host="b", pid=r) for r in range(60, 64)] + [view(64, state="died", host="c")]
    text = describe(ranks, 60.0)
    assert text.startswith("rank 60, rank 61, rank 62, rank 63 and 1 more on b and c died (process 60, last seen ")
    assert "; ranks 0, 1, 2, 3 and 56 more wait in all_reduce at a.py:1 f; " in text
    assert "\n" not in text and len(text) < 500


def test_where_none_is_missing_the_network_is_suspected():
    text = describe([view(0, "all_reduce", [1]), view(1, "all_reduce", [0])], 600.0)
    assert text.startswith("no rank goes on since 600 s, though none is missing; ranks 0 and 1 wait in all_reduce at ")


# Who is slow

STAGE = [range(4)]


def windows(slow: SlowRanks, n: int, busy_s: list[float], start: int = 0, step_s: float = 0.1) -> list[list[int]]:
    """The ranks named after each of n windows of 10 steps, given their work in a step."""
    found = []
    for window in range(start, start + n):
        work = {r: Work(10 * window, 10 * window * b, 10 * window * (step_s - b)) for r, b in enumerate(busy_s)}
        found.append([s.rank for s in slow.update(10.0 * window, work)])
    return found


def test_a_slow_rank_is_named_once_after_some_windows():
    slow = SlowRanks(STAGE, 1.5, 10.0)
    assert windows(slow, N_WINDOWS + 3, [0.04, 0.04, 0.08, 0.05]) == [[]] * N_WINDOWS + [[2]] + [[]] * 2


def test_who_is_slow_now_and_then_is_not_named():
    slow = SlowRanks(STAGE, 1.5, 10.0)
    for start in range(0, 30, 3):
        assert windows(slow, 2, [0.04, 0.04, 0.08, 0.04], start) == [[], []]
        assert windows(slow, 1, [0.0, 0.0, 0.0, 0.0], start + 2) == [[]]


@pytest.mark.parametrize(
    ("factor", "groups", "busy_s"),
    [
        (2.5, STAGE, [0.04, 0.04, 0.08, 0.04]),  # not that much
        (0.0, STAGE, [0.04, 0.04, 0.08, 0.04]),  # switched off
        (1.5, STAGE, [0.001, 0.001, 0.003, 0.001]),  # three times as much of nothing
        (1.5, [[0], [1], [2], [3]], [0.04, 0.04, 0.08, 0.04]),  # nobody has the same to do
        (1.5, [[0, 1], [2, 3]], [0.03, 0.03, 0.08, 0.08]),  # another stage has more to do
    ],
)
def test_nobody_is_named(factor, groups, busy_s):
    assert windows(SlowRanks(groups, factor, 10.0), 8, busy_s) == [[]] * 8


def test_the_message_of_a_slow_rank_has_its_numbers():
    slow = SlowRanks(STAGE, 1.5, 10.0)
    windows(slow, N_WINDOWS, [0.04, 0.04, 0.08, 0.04])
    work = {r: Work(30, 30 * b, 30 * (0.1 - b)) for r, b in enumerate([0.04, 0.04, 0.08, 0.04])}
    (found,) = slow.update(10.0 * N_WINDOWS, work)
    assert str(found) == "busy for 80 ms of a step of 100 ms, its peers for 40 ms"


# Where a thread is


def seen_from_aside(look: Callable[[], Any]) -> Any:
    """What another thread sees of this one."""
    found = []
    thread = threading.Thread(target=lambda: found.append(look()))
    thread.start()
    thread.join()
    return found[0]


def test_the_place_is_the_innermost_line_of_ours():
    site = seen_from_aside(call_site)  # inside of threading.py
    assert site.place.endswith(" seen_from_aside") and "test_watch.py:" in site.place
    assert site.collective is None
    assert "threading.py" in site.stack[0]


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        Doubling.site = seen_from_aside(call_site)
        return 2 * grads[0]


def test_the_backward_pass_is_seen():
    Doubling.apply(torch.ones(1, requires_grad=True)).backward()
    assert "test_watch.py" in Doubling.site.place


def seen_during(do: Callable[[], object]) -> CallSite:
    """What another thread sees of this one 0.3 s after it has begun with that."""
    found = []
    look = threading.Timer(0.3, lambda: found.append(call_site()))
    look.start()
    with suppress(ValueError):
        do()
    look.join()
    return found[0]


def test_a_rank_that_has_failed_is_where_it_failed_and_not_in_the_watch(monkeypatch):
    """The watch has it wait for the news that it failed because another rank is lost."""
    monkeypatch.setattr("megagpt.processes.watch.watch.DOUBT_S", 1.0)
    ours, theirs = socket.socketpair()
    thread = WatchThread(0, 0, Wire(ours), "token", Limits())

    def fails() -> None:
        raise ValueError

    def fails_and_doubts() -> None:
        try:
            fails()
        except ValueError:
            Watch(thread).doubt()

    site = seen_during(fails_and_doubts)
    assert site.place.endswith(" fails") and site.stack[0] == site.place and site.collective is None
    assert seen_during(Watch(thread).doubt).place.endswith(" seen_during")  # no error: the line that called the watch
    theirs.close()


def test_a_collective_that_fails_is_where_a_rank_is_until_it_goes_on(monkeypatch):
    """Torch logs its error first, in a function that is no collective."""
    logger, handler = c10d_logger._c10d_logger, logging.StreamHandler(io.StringIO())
    handler.lock = None
    monkeypatch.setattr(handler, "acquire", partial(time.sleep, 1.0))
    logger.addHandler(handler)
    try:
        site = seen_during(lambda: dist.all_reduce(torch.ones(1)))  # there is no group
    finally:
        logger.removeHandler(handler)
    assert site.collective == "all_reduce" and site.place.endswith(" <lambda>")


def ranks_in(kind: str) -> tuple | None:
    """On rank 0: what is seen of it while it waits for rank 1."""
    found = []

    def look() -> None:
        time.sleep(0.5)
        site = call_site()
        found.append((site.collective, site.place.split(" ")[-1], waits_for(), enqueued()))
        ready.set()

    ready = threading.Event()
    group = dist.new_group([0, 1])
    if dist.get_rank() == 0:
        threading.Thread(target=look).start()
    else:
        time.sleep(1.5)
    x = torch.ones(1)
    if kind == "all_reduce" and dist.get_rank() < 2:
        dist.all_reduce(x, group=group)
    elif kind == "recv" and dist.get_rank() < 2:
        dist.recv(x, 1) if dist.get_rank() == 0 else dist.send(x, 0)
    elif kind == "barrier":
        dist.barrier()
    elif kind == "async" and dist.get_rank() < 2:
        work = dist.all_reduce(x, group=group, async_op=True)
        assert work is not None
        work.wait()
    if dist.get_rank() == 0:
        ready.wait()
        return found[0]
    return None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all_reduce", ("all_reduce", "ranks_in", [1], ("gloo:all_reduce", [0, 1]))),
        ("recv", ("recv", "ranks_in", [1], None)),
        ("barrier", ("barrier", "ranks_in", [1, 2], ("gloo:barrier", [0, 1, 2]))),
        ("async", ("wait", "ranks_in", None, ("gloo:all_reduce", [0, 1]))),
    ],
)
def test_a_collective_and_those_it_waits_for_are_seen(kind, expected):
    assert run_ranks(ranks_in, 3, kind)[0] == expected


def test_while_the_ranks_are_connected_none_waits_for_another(tmp_path):
    """The watch looks already then, and there is no group yet to be asked."""
    found = []

    def look() -> None:
        time.sleep(0.5)
        found.append((call_site().collective, waits_for()))

    looking = threading.Thread(target=look)
    looking.start()
    store = dist.FileStore(str(tmp_path / "store"), 2)
    with pytest.raises(RuntimeError):
        dist.init_process_group("gloo", store=store, rank=0, world_size=2, timeout=timedelta(seconds=1))
    looking.join()
    assert found == [("init_process_group", None)]


def test_a_thread_that_stays_is_still_and_one_that_goes_on_is_not():
    activity, release = Activity(), threading.Event()

    def look() -> list[float]:
        found = []
        time.sleep(0.1)  # until the other thread waits for this one
        for now_s in (1.0, 1.5, 2.0):
            activity.look(now_s)
            found.append(activity.report()["still_s"])
        return found

    assert seen_from_aside(look) == [0.0, 0.5, 1.0]
    with activity.step(7):
        assert activity.report()["step"] == "in step 7"
        assert seen_from_aside(look)[0] == 0.0
    assert activity.report()["step"] == "after step 7"
    release.set()


# Processes and connections


def test_the_state_of_a_process_is_known():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process_state(process.pid) == "runs"
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 5.0
        while process_state(process.pid) != "stopped":
            assert time.monotonic() < deadline
        process.kill()
        deadline = time.monotonic() + 5.0
        while process_state(process.pid) != "gone":  # before anybody has waited for it
            assert time.monotonic() < deadline
    assert process_state(process.pid) == "gone"
    assert machine_id() == machine_id()


def wires() -> tuple[Wire, socket.socket]:
    ours, theirs = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours.close()
        ours, _ = server.accept()
    return Wire(ours), theirs


def test_messages_come_whole_however_they_are_cut():
    wire, theirs = wires()
    for piece in (b'{"a": ', b'1}\n{"b": 2}\n{"c"'):
        theirs.sendall(piece)
    time.sleep(0.1)
    assert wire.receive() == [{"a": 1}, {"b": 2}]
    theirs.sendall(b": 3}\n")
    assert wire.receive() == [{"c": 3}]
    theirs.close()
    assert wire.receive() == [] and wire.ended


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\xff\xfe\n", b"3\n", b"9" * 5000 + b"\n"])
def test_a_stranger_is_hung_up_on(text):
    wire, theirs = wires()
    theirs.sendall(text)
    time.sleep(0.05)
    assert wire.receive() == [] and wire.ended


def test_a_line_without_end_is_hung_up_on():
    wire, theirs = wires()
    sender = threading.Thread(target=lambda: theirs.sendall(b" " * (2 * MAX_LINE_BYTES)), daemon=True)
    sender.start()
    while not wire.ended:
        assert wire.receive() == []
    wire.close()
    sender.join(5.0)


def test_only_those_of_the_run_are_heard():
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    circle = Circle(listener, "secret", range(2))
    hello = {"host": "h", "pid": os.getpid()}
    for message in ({"token": "wrong", "number": 0, **hello}, {"token": "secret", "number": 2, **hello}, {"bye": True}):
        stranger = Wire(socket.create_connection(address))
        stranger.send(**message)
        while not stranger.ended:
            assert list(circle.hear(0.0, 0.0)) == []
            if select.select([stranger.socket], [], [], 0.05)[0]:
                assert stranger.receive() == []
    first, again, second = (Wire(socket.create_connection(address)) for _ in range(3))
    first.send(token="secret", number=0, **hello)
    assert [number for number, _ in heard(circle, 1)] == [0]
    again.send(token="secret", number=0, **hello)  # a second one of its number is none
    while not again.ended:
        assert list(circle.hear(0.0, 0.0)) == []
        if select.select([again.socket], [], [], 0.05)[0]:
            assert again.receive() == []
    second.send(token="secret", number=1, **hello)
    assert [number for number, _ in heard(circle, 1)] == [1] and circle.complete
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    circle.tell([1], pulse=True)
    assert second.receive() == [{"pulse": True}]
    first.send(bye=True)
    first.close()
    assert heard(circle, 2) == [(0, {"bye": True}), (0, {"gone": True})]
    circle.close()


def heard(circle: Circle, n: int) -> list[tuple[int, dict[str, Any]]]:
    """The next n messages."""
    found: list[tuple[int, dict[str, Any]]] = []
    deadline = time.monotonic() + 20.0
    while len(found) < n:
        assert time.monotonic() < deadline
        found += circle.hear(0.05, 0.0)
    return found
