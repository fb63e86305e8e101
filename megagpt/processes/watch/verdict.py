"""What is decided and said of ranks that are lost: who is to blame, in one line that names the cause.

No sockets, no threads, no torch. Of N ranks it takes a time that grows as N.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

PARTNERS = {"send": "recv", "recv": "send"}
MAX_NAMED = 4  # culprits, and places of others, that one line names


Needs = tuple[range, ...]
"""Ranks, as few ranges as they make: a group of the mesh is one."""


def needs(rank: int, collective: str | None, others: Iterable[int]) -> Needs:
    """Whom a collective of this rank needs: all that are in it, itself too; the partner of a send or a receive."""
    wanted = sorted({*others} if collective in PARTNERS else {*others, rank})
    found: list[range] = []
    while wanted:
        step = wanted[1] - wanted[0] if len(wanted) > 1 else 1
        n = 1
        while n < len(wanted) and wanted[n] - wanted[n - 1] == step:
            n += 1
        found.append(range(wanted[0], wanted[n - 1] + 1, step))
        wanted = wanted[n:]
    return tuple(found)


@dataclass
class RankView:
    """What is known of one rank.

    name: in mesh terms. step: what it says of its progress, "in step 12". still_s: for how long it has not moved.
    waits_for: `needs` of its collective; () when it is in none; None where it has not said.
    state: "runs"; "left" when it ended in order; "died"; "stopped" by a signal; "silent"; "unwatched".
    watch: the process of the watch on its host, where that is silent as a whole.
    With a step of "" it is no rank, but a process of the watch.
    """

    rank: int
    name: str
    host: str = "an unknown host"
    pid: int = 0
    step: str = "before its first step"
    place: str = ""
    collective: str | None = None
    still_s: float = 0.0
    waits_for: Needs | None = ()
    stack: Sequence[str] = field(default=(), repr=False)
    state: str = "runs"
    watch: int = 0

    @property
    def at(self) -> str:
        """Where it is."""
        if not self.place:
            return "at a place unknown"
        return f"in {self.collective} at {self.place}" if self.collective else f"at {self.place}, in no collective"


def culprits(ranks: Sequence[RankView]) -> list[RankView]:
    """Who does not come while others wait: the dead and the silent; else those on whom all the waiting rests.

    A rank waits for those that its collective needs and that are not in the same one. Followed from rank to rank, that
    ends with one that waits for nobody, or with some that wait for each other in a circle.
    """
    lost = [r for r in ranks if r.state in ("died", "stopped", "silent")]
    if lost:
        return lost
    waits = _waits(ranks)
    wanted = {node for nodes in waits.values() for node in nodes}
    ends = {node for circle in _ends(waits) for node in circle}
    found = [r for r in ranks if r.rank in wanted and r.rank in ends]
    # Of whom nothing is known but that it waits, it is not known whether others are to blame.
    known = [r for r in found if r.waits_for is not None or r.collective is None]
    return known or found


def _waits(ranks: Sequence[RankView]) -> dict[Hashable, Sequence[Hashable]]:
    """Who waits for whom. A collective in which some are missing stands between those in it and the missing ones."""
    present: dict[Hashable, set[int]] = defaultdict(set)
    for r in ranks:
        present[r.collective, r.waits_for].add(r.rank)
    waits: dict[Hashable, Sequence[Hashable]] = {r.rank: () for r in ranks}
    by_rank = {r.rank: r for r in ranks}
    for r in ranks:
        if r.collective in PARTNERS:
            waits[r.rank] = [m for m in _ranks(r) if not _meet(r, by_rank[m])]
            continue
        meeting = (r.collective, r.waits_for)
        if meeting not in waits:
            waits[meeting] = [m for m in _ranks(r) if m not in present[meeting]]
        if waits[meeting]:
            waits[r.rank] = [meeting]
    return waits


def _ranks(r: RankView) -> Iterator[int]:
    return (rank for span in r.waits_for or () for rank in span)


def _meet(a: RankView, b: RankView) -> bool:
    """Whether one sends what the other receives."""
    return b.collective == PARTNERS[a.collective or ""] and a.rank in _ranks(b)


def _ends(waits: Mapping[Hashable, Sequence[Hashable]]) -> Iterator[Sequence[Hashable]]:
    """Where all waiting ends: one that waits for nobody, or a circle in which each waits for the others and none else.

    The strongly connected components without a way out (Tarjan 1972).
    """
    number: dict[Hashable, int] = {}
    lowest: dict[Hashable, int] = {}
    open_: dict[Hashable, None] = {}  # in the order in which they were met, while it is not known where they belong
    leads_out: set[Hashable] = set()
    for first in waits:
        way = [] if first in number else [(first, iter(waits[first]))]
        while way:
            node, others = way[-1]
            if node not in number:
                number[node] = lowest[node] = len(number)
                open_[node] = None
            for other in others:
                if other not in number:
                    way.append((other, iter(waits[other])))
                    break
                if other in open_:
                    lowest[node] = min(lowest[node], number[other])
                else:
                    leads_out.add(node)
            else:
                way.pop()
                if lowest[node] == number[node]:
                    circle = [open_.popitem()[0]]
                    while circle[-1] != node:
                        circle.append(open_.popitem()[0])
                    if leads_out.isdisjoint(circle):
                        yield circle
                    if way:
                        leads_out.add(way[-1][0])
                elif way:
                    lowest[way[-1][0]] = min(lowest[way[-1][0]], lowest[node])


def describe(ranks: Sequence[RankView], timeout_s: float) -> str:
    """The message: who, on which host, in which step, where; where the others wait; what to do.

    timeout_s: how long nobody heard of the lost ones, or how long a rank waited.
    """
    found = culprits(ranks)
    others = [r for r in ranks if r not in found and r.state == "runs"]
    what, advice = _what(found, timeout_s)
    if found:
        hosts = list(dict.fromkeys(r.host for r in found))
        names = [r.name for r in found[:MAX_NAMED]] + [f"{len(found) - MAX_NAMED} more"] * (len(found) > MAX_NAMED)
        what = f"{_listed(names)} on {_listed(hosts[:MAX_NAMED])} {what}"
    parts = [what, *_places(others), f"{advice}; then start again with --auto-resume"]
    return "; ".join(parts)


def _what(found: Sequence[RankView], timeout_s: float) -> tuple[str, str]:
    """What happened to the culprits, told of the first, and what to do about it."""
    slow = "if it was only slow, raise --faults.progress-timeout-s"
    if not found:
        return f"no rank goes on since {timeout_s:g} s, though none is missing", f"look at the network; {slow}"
    first = found[0]
    seen = f"(process {first.pid}" + (f", last seen {first.step} {first.at})" if first.step else ")")
    if first.state == "died":
        return (
            f"died {seen}",
            "look for its signal in the launcher's lines or the kernel's log (9: often out of memory)",
        )
    if first.state == "stopped":
        return f"was stopped by a signal {seen}", f"end what is stopped (kill -9 {first.pid})"
    if first.state == "silent":
        what = f"gave no sign of life for {timeout_s:g} s {seen}"
        watch = f", its watch (process {first.watch})" if first.watch else ""
        return what, f"see whether {first.host}{watch} and the network to it are up"
    if first.state == "left":
        return f"ended {first.step}, and others still wait", "please report this bug"
    if len(found) > 1:
        return f"wait for each other since {timeout_s:g} s: {', '.join(_places(found))}", slow
    return f"hangs {first.step} {first.at}; others wait since {timeout_s:g} s", slow


def _places(ranks: Iterable[RankView]) -> list[str]:
    """Where ranks are, those at one place together."""
    by_place: dict[str, list[RankView]] = defaultdict(list)
    for rank in ranks:
        by_place[rank.at].append(rank)
    shown = [f"{_who(found)} {at}" for at, found in list(by_place.items())[:MAX_NAMED]]
    return shown + [f"{len(by_place) - MAX_NAMED} places more"] * (len(by_place) > MAX_NAMED)


def _who(ranks: Sequence[RankView]) -> str:
    """Subject and verb: "ranks 0 and 1 wait"."""
    waits = ranks[0].collective is not None
    if len(ranks) == 1:
        return f"rank {ranks[0].rank}" + (" waits" if waits else " is")
    numbers = [str(r.rank) for r in ranks[:MAX_NAMED]] + [f"{len(ranks) - MAX_NAMED} more"] * (len(ranks) > MAX_NAMED)
    return f"ranks {_listed(numbers)}" + (" wait" if waits else " are")


def _listed(words: Sequence[str]) -> str:
    """The words as English lists them."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
