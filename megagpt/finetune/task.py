"""What a model is fine-tuned for: a kind is a file beside this one, and a line of start.py. No torch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.data.tokenizers.tokenizer import Bounds, Tokenizer
from megagpt.errors import UserError
from megagpt.files import os_reason
from megagpt.finetune.example import Examples


@dataclass(frozen=True)
class Reading:
    """How text becomes tokens. vocab: of the model, beyond which delimiters begin. bounds: see `Bounds`."""

    tokenizer: Tokenizer
    bounds: Bounds
    vocab: int
    seq_len: int


class Task(ABC):
    """One of a run. n_classes: of its classifier; 0 where there is none."""

    n_classes: int = 0

    @abstractmethod
    def read(self, path: Path, reading: Reading, *, answered: bool = True) -> Examples:
        """The examples of a file. answered: its answers are wanted.  Raises UserError naming file and line."""


class Classification(Task):
    """A task with a classifier. n_classes: 1 where a number is asked for."""

    @abstractmethod
    def figures(self, scores_NC: np.ndarray, examples: Examples) -> Mapping[str, float]:
        """What the task is measured by, by name, from the classifier's scores of each example."""

    @abstractmethod
    def predictions(self, scores_NC: np.ndarray) -> Sequence[str]:
        """The answers as the task's own files have them."""


def text_of(path: Path, flag: str) -> tuple[str, str]:
    """A UTF-8 file, and its SHA-256.  Raises UserError where it cannot be read."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig"), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)})", remedy=f"check {flag}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1  # pyright: ignore[reportPossiblyUnboundVariable]
        raise UserError(f"{path}: line {line} is not UTF-8", remedy="save the file as UTF-8") from None
