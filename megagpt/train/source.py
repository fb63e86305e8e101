"""What a run trains on, begins with and is judged by: text (train/text.py), or the examples of a task (finetune/)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megagpt.checkpoint.state import DataState, State
from megagpt.config import RunConfig
from megagpt.data.indexed.blend import Samples
from megagpt.data.loader import Rows
from megagpt.data.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megagpt.schedule import Schedule
    from megagpt.train.run import Run
    from megagpt.train.step.engine import Engine

AnySamples = Samples | Rows


@dataclass(frozen=True)
class Validation:
    """What a validation found, the same on every rank. loss: mean, in nats per token that counts, or of an answer.

    bits_per_byte: of text, where its bytes are known; on rank 0.  figures: what the task is measured by, by name.
    score: the one of them that checkpoints are compared by, the higher the better; None: they are by the loss.
    """

    loss: float
    bits_per_byte: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None


class Source(ABC):
    """One of a run. What reads files raises UserError, on every rank that finds it so."""

    @abstractmethod
    def samples(self, config: RunConfig) -> tuple[AnySamples, AnySamples | None]:
        """For training all that the run will read, in its order; and for validation, None where nothing is held out."""

    @abstractmethod
    def tokenizer(self, config: RunConfig) -> Tokenizer | None:
        """Of the text; None where it is not known."""

    @abstractmethod
    def identity(self, config: RunConfig, samples: AnySamples, tokenizer: Tokenizer | None) -> DataState:
        """Which data this is, for checkpoints to record."""

    @abstractmethod
    def verify(self, config: RunConfig) -> None:
        """Read all of it, where data.verify asks for that."""

    @abstractmethod
    def lines(self, run: Run) -> Iterator[str]:
        """What the log says of it."""

    @abstractmethod
    def remarks(self, run: Run, schedule: Schedule, resumed: State | None) -> Iterator[str]:
        """What is worth a note before the first step."""

    @abstractmethod
    def begin(self, run: Run, engine: Engine, say: Callable[[str], None]) -> None:
        """Set the first weights of a new run, where they are not those that its seed draws.  Comm: collective."""

    @abstractmethod
    def validate(self, run: Run, engine: Engine, step: int) -> Validation | None:
        """Judge the model after `step` steps; None where nothing is held out.  Comm: the engine's, and collective."""

    def end(self, run: Run, engine: Engine) -> None:  # noqa: B027  # most have nothing more to write
        """After the last step.  Comm: collective."""
