"""How a rank gets on: its step, for how long it has not moved, and how much of its steps it waits for others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megagpt.processes.watch.call_site import CallSite, call_site

MAX_GAP_S = 1.0  # more between two looks is sleep of the looking thread, and counts for neither work nor waiting


class Activity:
    """Told of steps by the main thread, looked at by the watch thread.

    busy_s, waiting_s: inside of steps, outside and inside of collectives. On a GPU they mean nothing: the host thread
    does not wait in a collective there.
    """

    def __init__(self) -> None:
        self.failed_at: CallSite | None = None  # instead of the place where the thread is, once it has failed
        self._step: int | None = None
        self._in_step = False
        self._n_marks = 0
        self._site = call_site()
        self._moved_at = self._looked_at = 0.0
        self._busy_s = self._waiting_s = 0.0
        self._at_mark = (0, 0.0, 0.0)
        self._n_looked_marks = -1

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Mark a training step, from 1, while it lasts."""
        self._step, self._in_step = step, True
        self._n_marks += 1
        yield
        self._in_step = False
        self._n_marks += 1
        self._at_mark = (step, self._busy_s, self._waiting_s)

    def look(self, now_s: float) -> None:
        """See where the busy thread is. now_s: a clock that does not jump."""
        site = self.failed_at or call_site()
        if site.lines != self._site.lines or self._n_marks != self._n_looked_marks:
            self._moved_at = now_s
        gap_s = now_s - self._looked_at
        if self._in_step and gap_s < MAX_GAP_S:
            if site.collective:
                self._waiting_s += gap_s
            else:
                self._busy_s += gap_s
        self._site, self._looked_at, self._n_looked_marks = site, now_s, self._n_marks

    def report(self) -> dict[str, Any]:
        """As it was at the last look."""
        steps_done, busy_s, waiting_s = self._at_mark
        return {
            "step": self._words(),
            "place": self._site.place,
            "collective": self._site.collective,
            "still_s": self._looked_at - self._moved_at,
            "steps_done": steps_done,
            "busy_s": busy_s,
            "waiting_s": waiting_s,
        }

    def _words(self) -> str:
        if self._step is None:
            return "before its first step"
        return f"in step {self._step}" if self._in_step else f"after step {self._step}"
