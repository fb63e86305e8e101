"""RUN/faults/step-000057.json: what went wrong in a step, and the text that it was trained on, to be looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.data.indexed.blend import Samples
from megagpt.data.tokenizers.tokenizer import Tokenizer
from megagpt.files import replace_text

MOST_TEXTS = 16  # samples whose text is shown; documents are told of all
MOST_CHARACTERS = 2000  # of a sample
MOST_TOKENS = 200  # of a sample, where there is no tokenizer to read them


@dataclass(frozen=True)
class FaultNotes:
    """Writes notes about the faults of one run. writes: this is the rank that does it (the others do nothing)."""

    run: Path
    samples: Samples
    tokenizer: Tokenizer | None
    writes: bool

    def write(self, step: int, what: dict[str, Any], positions: Sequence[int]) -> str:
        """Write down a fault of step `step` (counted from 1) and the samples at these positions of the run.

        Returns where it stands, or why it does not: a note that cannot be written is no reason to stop.
        """
        path = self.run / "faults" / f"step-{step:06d}.json"
        if not self.writes:
            return str(path)
        note = {"step": step, **what, "samples": [self._sample(n, p) for n, p in enumerate(positions)]}
        try:
            path.parent.mkdir(exist_ok=True)
            replace_text(path, json.dumps(_strict(note), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            return f"not in {path}, which cannot be written ({error.strerror})"
        return str(path)

    def _sample(self, number: int, position: int) -> dict[str, Any]:
        names = ("dataset", "document", "first_token", "n_tokens")
        pieces = [dict(zip(names, piece, strict=True)) for piece in self.samples.sources_of(position)]
        told: dict[str, Any] = {"position": position, "documents": pieces}
        if number < MOST_TEXTS:
            tokens = self.samples[position]
            if self.tokenizer is None:
                told["tokens"] = tokens[:MOST_TOKENS].tolist()
            else:
                told["text"] = self.tokenizer.decode(tokens.tolist())[:MOST_CHARACTERS]
        return told


def _strict(value: Any) -> Any:
    """JSON has no NaN: as words."""
    if isinstance(value, dict):
        return {key: _strict(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
