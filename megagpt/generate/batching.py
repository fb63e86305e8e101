"""Which rows go through the model next: requests join and leave between passes. No torch.

Each rank of a model keeps this by itself, and decides the same: only the tokens that were drawn travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megagpt.generate.request import Finish, Request, Sampling


@dataclass(eq=False)
class Sample:
    """One text of a request while it grows.

    tokens: the prompt's and those written; where nothing is written, not the last one, which nothing follows.
    n_dropped: of them, before the window, where the context slides.
    n_done: of the window, those that the cache holds.
    """

    number: int
    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)
    n_dropped: int = 0
    n_done: int = 0
    finish: Finish | None = None

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


@dataclass(frozen=True)
class Pass:
    """One way of some rows of a group through the model: the next tokens of each, at most n_tokens of them."""

    group: Group
    first_row: int
    samples: tuple[Sample, ...]
    n_tokens: int

    @property
    def starts(self) -> list[int]:
        """The position of each row's first token."""
        return [sample.n_done for sample in self.samples]

    @property
    def counts(self) -> list[int]:
        """Tokens of each row: 0 where a row waits for others that are longer."""
        return [min(self.n_tokens, sample.n_left) for sample in self.samples]

    @property
    def items(self) -> list[tuple[Sample, int]]:
        """Each row, and how many of its tokens."""
        return list(zip(self.samples, self.counts, strict=True))

    @property
    def draws(self) -> list[bool]:
        """Which rows have their last token in this pass, so that the next one is drawn."""
        return [0 < sample.n_left <= self.n_tokens for sample in self.samples]


@dataclass(eq=False)
class Group:
    """Rows of one cache. Those that write stand first, then those whose prompts are being read, side by side.

    move: copies one row of the cache over another one.
    """

    number: int
    n_rows: int
    chunk: int
    move: Callable[[int, int], None]
    rows: list[Sample] = field(default_factory=list)
    n_writing: int = 0
    read_last: bool = False

    def admit(self, waiting: deque[Sample], n_wanted: int) -> None:
        """Take in those that wait, up to n_wanted rows, unless prompts are being read: first these, together."""
        if self.n_writing == len(self.rows):
            while waiting and len(self.rows) < min(n_wanted, self.n_rows):
                self.rows.append(waiting.popleft())

    def next_pass(self) -> Pass | None:
        """Prompts and writing take turns, so that a long prompt does not hold up those that write."""
        writing, reading = self.rows[: self.n_writing], self.rows[self.n_writing :]
        if not self.rows:
            return None
        self.read_last = bool(reading) and not (self.read_last and writing)
        if not self.read_last:
            return Pass(self, 0, tuple(writing), 1)
        longest = max(sample.n_left for sample in reading)
        return Pass(self, self.n_writing, tuple(reading), min(self.chunk, longest))

    def passed(self, done: Pass, counts: list[int], n_places: int) -> list[Sample]:
        """Note what the cache holds after a pass; let those go that have ended, and those write that can.

        Returns those whose context is full: their last half is to be read anew, as soon as there is a row.
        """
        full = []
        for sample, count in zip(done.samples, counts, strict=True):
            sample.n_done += count
            if sample.finish is None and sample.n_window > n_places:
                sample.slide(n_places)
                full.append(sample)
        for sample in done.samples:
            if sample.finish is not None or sample in full:
                self.remove(sample)
        if all(sample.n_left == 1 for sample in self.rows[self.n_writing :]):
            self.n_writing = len(self.rows)
        return full

    def remove(self, sample: Sample) -> None:
        """Close the gap it leaves, by the last row of its kind and then the last one of all."""
        gap = self.rows.index(sample)
        if gap < self.n_writing:
            self.n_writing -= 1
            self._fill(gap, self.n_writing)
            gap = self.n_writing
        self._fill(gap, len(self.rows) - 1)
        self.rows.pop()

    def _fill(self, gap: int, row: int) -> None:
        if gap != row:
            self.move(row, gap)
            self.rows[gap] = self.rows[row]


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

    def passed(self, done: Pass, counts: list[int], n_places: int) -> None:
        """A pass has left the last stage."""
        self.busy.discard(done.group.number)
        self.waiting.extendleft(reversed(done.group.passed(done, counts, n_places)))

    def drop_ended(self) -> None:
        """Let those go that were cancelled; who is under way goes after the pass."""
        self.waiting = deque(sample for sample in self.waiting if sample.finish is None)
        for group in self.groups:
            if group.number not in self.busy:
                for sample in [sample for sample in group.rows if sample.finish is not None]:
                    group.remove(sample)
