"""What is decided and said of ranks: who is lost, in one line that names the cause, and who is slow.

A rank's time in a step is work and waiting in collectives. A slow rank makes all slow, but it alone waits little.
No sockets, no threads, no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

MAX_NAMED = 4  # culprits, and places of others, that one line names


@dataclass
class RankView:
    """What is known of one rank.

    name: in mesh terms. step: what it says of its progress, "in step 12". still_s: for how long it has not moved.
    waits_for: the ranks that its collective needs; [] when it is in none.
    state: "runs"; "left" when it ended in order; "died"; "stopped" by a signal; "silent".
    """

    rank: int
    name: str
    host: str = "an unknown host"
    pid: int = 0
    step: str = "before its first step"
    place: str = ""
    collective: str | None = None
    still_s: float = 0.0
    waits_for: Sequence[int] = ()
    stack: Sequence[str] = field(default=(), repr=False)
    state: str = "runs"

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
    by_rank = {r.rank: r for r in ranks}
    waits = {r.rank: {m for m in r.waits_for if not _meet(r, by_rank[m])} for r in ranks}
    for _ in ranks:  # whom a rank waits for, directly or through others
        waits = {rank: needs.union(*(waits[m] for m in needs)) for rank, needs in waits.items()}
    wanted = set().union(*waits.values())
    return [by_rank[rank] for rank in sorted(wanted) if all(rank in waits[m] for m in waits[rank])]


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
    seen = f"(process {first.pid}, last seen {first.step} {first.at})"
    if first.state == "died":
        return (
            f"died {seen}",
            "look for its signal in the launcher's lines or the kernel's log (9: often out of memory)",
        )
    if first.state == "stopped":
        return f"was stopped by a signal {seen}", f"end what is stopped (kill -9 {first.pid})"
    if first.state == "silent":
        what = f"gave no sign of life for {timeout_s:g} s {seen}"
        return what, f"see whether {first.host} and the network to it are up"
    if first.state == "left":
        return f"ended {first.step}, and others still wait", "please report this bug"
    if len(found) > 1:
        return f"wait for each other since {timeout_s:g} s: {', '.join(_places(found))}", slow
    return f"hangs {first.step} {first.at}; others wait since {timeout_s:g} s", slow


def _meet(a: RankView, b: RankView) -> bool:
    """Whether b is in the collective that a waits in, so that a does not wait because of b."""
    sends = {"send": "recv", "recv": "send"}
    if a.collective in sends:
        return b.collective == sends[a.collective] and a.rank in b.waits_for
    return b.collective == a.collective and {a.rank, *a.waits_for} == {b.rank, *b.waits_for}


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


WINDOW_S = 10.0  # compared at once: 200 looks at each rank
N_WINDOWS = 3  # in a row, before a rank is named
MIN_STEPS = 2  # in a window
MIN_SHARE = 0.1  # of a step that must be lost: a rank may well be busy for 3 ms while its peers are for 1


@dataclass(frozen=True)
class Work:
    """Totals since the start, in steps: of every rank's."""

    steps_done: int
    busy_s: float
    waiting_s: float


@dataclass(frozen=True)
class Slow:
    """A rank that is slow: its work in a step, the whole step, and the work of its peers (the median)."""

    rank: int
    busy_s: float
    step_s: float
    peers_s: float

    def __str__(self) -> str:
        return (
            f"busy for {1e3 * self.busy_s:.0f} ms of a step of {1e3 * self.step_s:.0f} ms, "
            f"its peers for {1e3 * self.peers_s:.0f} ms"
        )


class SlowRanks:
    """Compares ranks window by window."""

    def __init__(self, groups: Sequence[Sequence[int]], factor: float, window_s: float) -> None:
        """groups: the ranks that have the same to do (a pipeline stage). factor: how much longer is slow; 0: never."""
        self.factor, self.window_s = factor, window_s
        self.groups = [group for group in groups if len(group) > 1] if factor else []
        self._began_s = 0.0
        self._before: Mapping[int, Work] = {}
        self._n_slow = dict.fromkeys((rank for group in self.groups for rank in group), 0)

    def update(self, now_s: float, work: Mapping[int, Work]) -> list[Slow]:
        """Who has become slow, given the work of ranks until now; usually nobody."""
        if not self._n_slow or not self._n_slow.keys() <= work.keys():
            return []
        found: list[Slow] = []
        if self._before:
            fewest = min(work[rank].steps_done - self._before[rank].steps_done for rank in self._n_slow)
            if now_s - self._began_s < self.window_s or fewest < MIN_STEPS:
                return []
            found = [slow for group in self.groups for slow in self._compare(group, work)]
        self._began_s, self._before = now_s, dict(work)
        return found

    def _compare(self, group: Sequence[int], work: Mapping[int, Work]) -> Iterator[Slow]:
        spent = {rank: _per_step(work[rank], self._before[rank]) for rank in group}
        for rank in group:
            busy_s, step_s = spent[rank]
            peers_s = median(spent[other][0] for other in group if other != rank)
            slow = busy_s > self.factor * peers_s and busy_s - peers_s > MIN_SHARE * step_s
            self._n_slow[rank] = self._n_slow[rank] + 1 if slow else 0
            if self._n_slow[rank] == N_WINDOWS:  # once, until it has been fast again
                yield Slow(rank, busy_s, step_s, peers_s)


def _per_step(now: Work, before: Work) -> tuple[float, float]:
    """Seconds of work and seconds in all, per step of the window."""
    n_steps = now.steps_done - before.steps_done
    busy_s = (now.busy_s - before.busy_s) / n_steps
    return busy_s, busy_s + (now.waiting_s - before.waiting_s) / n_steps
