"""Which rows go through the model next: requests join and leave between passes. No torch.

Each rank of a model keeps this by itself, and decides the same: only the tokens that were drawn travel.

A beginning that texts share is read once, by one of them, the source, and copied to the rows of the others, which go on
from there. Sources may have sources, so that texts form a tree: examples that all begin with, a question, its answers.
A text finds its source among those that write, and at the one that was taken in before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from megagpt.generate.request import Finish, Request, Sampling

WORTH = 16  # tokens: fewer are read again, rather than in a pass of their own


@dataclass(eq=False)
class Sample:
    """One text of a request while it grows.

    tokens: the prompt's and those written; where nothing is written, not the last one, which nothing follows.
    n_dropped: of them, before the window, where the context slides.
    n_done: of the window, those that the cache holds.
    source: the text that reads the first n_shared tokens of the window for this one, which waits for it; then None.
    """

    number: int
    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)
    n_dropped: int = 0
    n_done: int = 0
    finish: Finish | None = None
    source: Sample | None = None
    n_shared: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        if self.sampling.only_scores:
            self.tokens = self.tokens[: max(1, len(self.tokens) - 1)]

    @property
    def sampling(self) -> Sampling:
        """What is asked for."""
        return self.request.sampling

    @property
    def n_written(self) -> int:
        """Tokens beyond the prompt."""
        return max(0, len(self.tokens) - len(self.request.prompt))

    @property
    def written(self) -> list[int]:
        """The tokens beyond the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def n_window(self) -> int:
        """Tokens that the model sees, or is to see."""
        return len(self.tokens) - self.n_dropped

    @property
    def n_left(self) -> int:
        """Tokens that it has not seen."""
        return self.n_window - self.n_done

    def slide(self, n_places: int) -> None:
        """Go on with the last half of the context, at its beginning."""
        self.n_dropped, self.n_done = len(self.tokens) - max(1, n_places // 2), 0

    def window(self, n: int) -> list[int]:
        """The next n tokens that it has not seen."""
        start = self.n_dropped + self.n_done
        return self.tokens[start : start + n]

    def n_common(self, source: Sample) -> int:
        """Tokens that another text can read for this one: all before what each has to say of its own places."""
        most = min(self.n_window, source.n_window) - 1
        if self.sampling.prompt_logprobs:
            most = min(most, self.sampling.first_scored - 1 - self.n_dropped)
        return common(*(text.tokens[text.n_dropped : text.n_dropped + max(0, most)] for text in (self, source)))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike."""
    most = min(len(one), len(other))
    return bisect_left(range(1, most + 1), True, key=lambda n: one[:n] != other[:n])


@dataclass(frozen=True)
class Pass:
    """One way of neighbouring rows of a group through the model: the next tokens of each, so many as counts says."""

    group: Group
    first_row: int
    samples: tuple[Sample, ...]
    counts: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Of the longest row."""
        return max(self.counts)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tokens as they go through the model: packed into one row where rows are of unequal length."""
        return (len(self.counts), self.n_tokens) if min(self.counts) == self.n_tokens else (1, sum(self.counts))

    @property
    def starts(self) -> list[int]:
        """The position of each row's first token."""
        return [sample.n_done for sample in self.samples]

    @property
    def items(self) -> list[tuple[Sample, int]]:
        """Each row, and how many of its tokens."""
        return list(zip(self.samples, self.counts, strict=True))

    @property
    def draws(self) -> list[bool]:
        """Which rows have their last token in this pass, so that the next one is drawn."""
        return [sample.n_left == count for sample, count in self.items]


@dataclass(eq=False)
class Group:
    """Rows of one cache: first those that write, then those whose prompts are read, then those that wait for a source.

    move: copies the first places of a row, so many, over those of another.
    n_kept: positions of a row that later ones do not overwrite, as they do in windows.
    shares: whether what a model makes of a beginning is the same whatever follows.
    """

    number: int
    n_rows: int
    chunk: int
    move: Callable[[int, int, int], None]
    n_kept: int
    shares: bool = True
    rows: list[Sample] = field(default_factory=list)
    n_writing: int = 0
    n_started: int = 0
    read_last: bool = False

    def admit(self, waiting: deque[Sample], n_wanted: int) -> None:
        """Take in those that wait, up to n_wanted rows, unless prompts are being read: first these, together."""
        if self.n_writing < len(self.rows):
            return
        some = self._first(waiting, min(n_wanted, self.n_rows) - len(self.rows))
        for sample in some:
            waiting.popleft()
            if self.shares:
                self._find_source(sample)
            self.rows.append(sample)
        self.rows[self.n_writing :] = sorted(some, key=lambda sample: sample.source is not None)
        self.n_started += sum(sample.source is None for sample in some)
        self._copy()

    def _first(self, waiting: deque[Sample], room: int) -> list[Sample]:
        """As many as there is room for; fewer, down to half, where that parts neighbours that share less."""
        some = list(islice(waiting, max(0, room) + 1))
        if len(some) <= room or room < 2 or not self.shares:
            return some[: max(0, room)]
        ends = range(room, room // 2, -1)
        return some[: min(ends, key=lambda end: some[end].n_common(some[end - 1]))]

    def _find_source(self, sample: Sample) -> None:
        """Among those that write; or the last one that was taken in with this one, or a source of that."""
        found = [
            (min(sample.n_common(other), other.n_done), other)
            for other in self.rows[: self.n_writing]
            if other.n_done <= self.n_kept
        ]
        n_shared, source = max(found, key=lambda entry: entry[0], default=(0, None))
        if len(self.rows) > self.n_writing:
            last = self.rows[-1]
            n = sample.n_common(last)
            while last.source is not None and n < last.n_shared + WORTH:
                n, last = min(n, last.n_shared), last.source
            if n > n_shared:
                n_shared, source = n, last
        if n_shared >= WORTH:
            near = [s for s in self.rows if s.source is source and abs(s.n_shared - n_shared) < WORTH]
            n_shared = min([n_shared, *(other.n_shared for other in near)])
            for other in (sample, *near):  # one halt of the source does for all of them
                other.source, other.n_shared = source, n_shared

    def _copy(self) -> None:
        """Let those go on by themselves whose beginning is read."""
        for sample in self.rows[self.n_started :]:
            if sample.source is not None and sample.source.n_done >= sample.n_shared:
                row = self.rows.index(sample)
                self.rows[row], self.rows[self.n_started] = self.rows[self.n_started], sample
                self.move(self.rows.index(sample.source), self.n_started, sample.n_shared)
                sample.n_done, sample.source = sample.n_shared, None
                self.n_started += 1

    def next_pass(self) -> Pass | None:
        """Prompts and writing take turns, so that a long prompt does not hold up those that write."""
        writing, reading = self.rows[: self.n_writing], self.rows[self.n_writing : self.n_started]
        if not self.rows:
            return None
        self.read_last = bool(reading) and not (self.read_last and writing)
        if not self.read_last:
            return Pass(self, 0, tuple(writing), (1,) * len(writing))
        halts = {sample.source: sample.n_shared for sample in self._waiting_longest_first()}
        counts = [min(self.chunk, s.n_left, halts.get(s, s.n_window) - s.n_done) for s in reading]
        return Pass(self, self.n_writing, tuple(reading), tuple(counts))

    def _waiting_longest_first(self) -> list[Sample]:
        return sorted(self.rows[self.n_started :], key=lambda sample: -sample.n_shared)

    def passed(self, done: Pass, n_places: int) -> list[Sample]:
        """Note what the cache holds after a pass; let those go that have ended, and those write that can.

        Returns those whose context is full: their last half is to be read anew, as soon as there is a row.
        """
        full = []
        for sample, count in done.items:
            sample.n_done += count
            if sample.finish is None and sample.n_window > n_places:
                sample.slide(n_places)
                full.append(sample)
        for sample in self.rows[::-1]:  # so that gaps are filled by rows that stay
            if sample.finish is not None or sample in full:
                self.remove(sample)
        self._copy()
        if all(sample.n_left == 1 for sample in self.rows[self.n_writing :]):
            self.n_writing = len(self.rows)
        return full

    def remove(self, sample: Sample) -> None:
        """Close the gap it leaves, by the last row of each kind from its own on."""
        self._bequeath(sample)
        gap = self.rows.index(sample)
        if gap < self.n_writing:
            self.n_writing -= 1
            gap = self._fill(gap, self.n_writing)
        if gap < self.n_started:
            self.n_started -= 1
            gap = self._fill(gap, self.n_started)
        self._fill(gap, len(self.rows) - 1)
        self.rows.pop()

    def _bequeath(self, sample: Sample) -> None:
        """Of those that wait for this one, which was given up, the one that shares most takes its row and goes on."""
        heirs = [other for other in self._waiting_longest_first() if other.source is sample]
        if heirs:
            first, *_ = heirs
            for other in heirs:
                other.source = first
            first.n_done, first.n_shared, first.source = sample.n_done, sample.n_shared, sample.source
            row, free = self.rows.index(sample), self.rows.index(first)
            self.rows[row], self.rows[free] = first, sample

    def _fill(self, gap: int, row: int) -> int:
        """Move a row to a gap; returns the gap that this leaves."""
        if gap != row:
            self.move(row, gap, self.rows[row].n_done)
            self.rows[gap] = self.rows[row]
        return row


class Batching:
    """Groups of rows, and who waits. A pipeline has as many groups as stages: one in each, at any time."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        self.waiting: deque[Sample] = deque()
        self.busy: set[int] = set()  # groups whose pass is under way
        self.turn = 0

    def __len__(self) -> int:
        return len(self.waiting) + sum(len(group.rows) for group in self.groups)

    def __iter__(self) -> Iterator[Sample]:
        """All that are not ended."""
        yield from self.waiting
        for group in self.groups:
            yield from group.rows

    def next_pass(self) -> Pass | None:
        """That of the next group which has something to do and is not under way."""
        n_each = -(-len(self) // len(self.groups))  # few texts are shared out over all groups
        for i in range(len(self.groups)):
            group = self.groups[(self.turn + i) % len(self.groups)]
            if group.number in self.busy:
                continue
            group.admit(self.waiting, n_each)
            found = group.next_pass()
            if found is not None:
                self.turn = group.number + 1
                self.busy.add(group.number)
                return found
        return None

    def passed(self, done: Pass, n_places: int) -> None:
        """A pass has left the last stage."""
        self.busy.discard(done.group.number)
        self.waiting.extendleft(reversed(done.group.passed(done, n_places)))

    def drop_ended(self) -> None:
        """Let those go that were cancelled; who is under way goes after the pass."""
        self.waiting = deque(sample for sample in self.waiting if sample.finish is None)
        for group in self.groups:
            if group.number not in self.busy:
                for sample in [sample for sample in group.rows if sample.finish is not None]:
                    group.remove(sample)
