"""What is said when ranks are lost: who is the cause, and one line that names it. No sockets, no threads, no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
    """Who does not come while others wait: the dead and the silent; else whom others wait for, and who waits for none.

    A rank waits for those that its collective needs and that are not in the same one. Where all wait for each other in
    a circle, all of them are returned; where nobody lacks in any collective, none is.
    """
    lost = [r for r in ranks if r.state in ("died", "stopped", "silent")]
    if lost:
        return lost
    by_rank = {r.rank: r for r in ranks}
    waits = {r.rank: [m for m in r.waits_for if m in by_rank and not _meet(r, by_rank[m])] for r in ranks}
    wanted = {m for needs in waits.values() for m in needs}
    return [by_rank[m] for m in sorted(wanted) if not waits[m]] or [by_rank[m] for m in sorted(wanted)]


def describe(ranks: Sequence[RankView], timeout_s: float) -> str:
    """The message: who, on which host, in which step, where; where the others wait; what to do.

    timeout_s: how long nobody heard of the lost ones, or how long a rank waited.
    """
    found = culprits(ranks)
    others = [r for r in ranks if r not in found and r.state == "runs"]
    if not found:
        return (
            f"no rank went on for {timeout_s:g} s, though none is missing: {_places(others)}; look at the network "
            "between the hosts; if it is only slow, raise --progress-timeout-s; then start again with --auto-resume"
        )
    first, more = found[0], found[1:MAX_NAMED]
    what, advice = _what(first, timeout_s)
    text = f"{first.name} on {first.host} {what}"
    if more:
        text += ", and so did " + ", ".join(f"{r.name} on {r.host}" for r in more)
    if len(found) > MAX_NAMED:
        text += f" and {len(found) - MAX_NAMED} more"
    if others:
        text += f"; the others: {_places(others)}"
    return f"{text}; {advice}"


def _what(rank: RankView, timeout_s: float) -> tuple[str, str]:
    """What happened to a rank, and what to do about it."""
    again = "then start again with --auto-resume"
    if rank.state == "died":
        what = f"died {rank.step} (process {rank.pid}, last seen {rank.at})"
        return (
            what,
            f"look for its signal in the launcher's lines or the kernel's log (9: often out of memory), {again}",
        )
    if rank.state == "stopped":
        what = f"was stopped by a signal {rank.step} (process {rank.pid}, last seen {rank.at})"
        return what, f"end that process (kill -9 {rank.pid} on {rank.host}), {again}"
    if rank.state == "silent":
        what = f"gave no sign of life for {timeout_s:g} s {rank.step} (process {rank.pid}, last seen {rank.at})"
        return what, f"see whether {rank.host} and the network to it are up, {again}"
    if rank.state == "left":
        return f"has ended {rank.step}, and others still wait for it", "this is a bug; please report it"
    hangs = f"hangs {rank.step} {rank.at}; others have waited for {timeout_s:g} s"
    return hangs, f"if it is only slow there, raise --progress-timeout-s; {again}"


def _meet(a: RankView, b: RankView) -> bool:
    """Whether b is in the collective that a waits in, so that a does not wait because of b."""
    sends = {"send": "recv", "recv": "send"}
    if a.collective in sends:
        return b.collective == sends[a.collective] and a.rank in b.waits_for
    return b.collective == a.collective and {a.rank, *a.waits_for} == {b.rank, *b.waits_for}


def _places(ranks: Iterable[RankView]) -> str:
    """Where ranks are, those at one place together."""
    by_place = defaultdict(list)
    for rank in ranks:
        by_place[("waits " if rank.collective else "") + rank.at].append(rank.rank)
    shown = [f"{_numbers(numbers)} {at}" for at, numbers in list(by_place.items())[:MAX_NAMED]]
    if len(by_place) > MAX_NAMED:
        shown.append(f"{len(by_place) - MAX_NAMED} places more")
    return ", ".join(shown)


def _numbers(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    listed = ", ".join(map(str, ranks[:MAX_NAMED]))
    return f"ranks {listed}" + (f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else "")
