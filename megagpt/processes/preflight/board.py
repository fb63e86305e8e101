"""What ranks tell each other before they are connected: JSON over the rendezvous store, collected by rank 0."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from torch.distributed import Store

from megagpt.errors import UserError
from megagpt.processes.agree import RankError

GIVEN_UP = "given up"  # a key: rank 0 has said why, and goes
LAST_WORD_S = 1.0  # the store goes with rank 0: so long it stays for the others to read what it said


@dataclass(frozen=True)
class Board:
    """Needs nothing but the store: it works where collectives would hang, and says who is missing."""

    store: Store
    rank: int
    world_size: int
    timeout_s: float

    def gather(self, topic: str, value: Any) -> list[Any]:
        """Every rank's JSON-able value, in rank order, on rank 0; an empty list on the others.

        Comm: one key a rank.  Raises UserError on rank 0, naming the ranks that told nothing within the timeout.
        """
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        if self.rank != 0:
            return []
        keys = [f"{topic}/{rank}" for rank in range(self.world_size)]
        if not self._came(keys, self.timeout_s):
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            self.store.set(GIVEN_UP, "")
            time.sleep(LAST_WORD_S)
            raise UserError(
                f"{self.world_size - len(missing)} of {self.world_size} ranks came within {self.timeout_s:.0f} s; "
                f"missing: {ranks_text(missing)}; look at their hosts' output, and at their way to this one's port"
            )
        return [json.loads(self.store.get(key)) for key in keys]

    def share(self, topic: str, value: Any = None) -> Any:
        """Rank 0's value, on every rank. Comm: one key, read by all.

        Raises RankError, silent, where rank 0 does not say anything: it has said why.
        """
        if self.rank == 0:
            self.store.set(topic, json.dumps(value))
            return value
        try:
            if self._came([topic], 2 * self.timeout_s) and not self.store.check([GIVEN_UP]):
                return json.loads(self.store.get(topic))
        except RuntimeError:  # the store went with rank 0
            pass
        raise RankError(f"rank 0 did not say {topic}", speaks=False)

    def _came(self, keys: list[str], timeout_s: float) -> bool:
        """Whether all keys are there within the time. Asks again and again: a wait that fails logs lines of C++."""
        end_s = time.monotonic() + timeout_s
        while not self.store.check(keys) and not self.store.check([GIVEN_UP]):
            if time.monotonic() > end_s:
                return False
            time.sleep(0.05)
        return True


def ranks_text(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    spans = [str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(spans)
