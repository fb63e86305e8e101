"""Fine-tuning: the task, the weights that it begins with, its files, and what of the model learns how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megagpt.config.checks import not_negative, paths, positive
from megagpt.config.values import Short
from megagpt.errors import require


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Of examples/finetune_gpt.py: the task, what it begins with, its files, what learns how fast."""

    task: Short[
        Literal["completion", "CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI", "QNLI", "RTE", "WNLI"] | None
    ] = None
    """completion: JSON lines of prompt and completion, or of messages; the others: GLUE's, from its files."""
    base: Short[str | None] = None
    """What to begin with: RUN, RUN@best, RUN@STEP, a checkpoint, or a folder of transformers; default: a new model."""
    weights: bool = True
    """Take the weights of the base; else its architecture and tokenizer alone, to compare with."""
    train_file: Short[str | None] = None
    """What to train on: JSON lines, or the task's train.tsv."""
    valid_file: Short[str | None] = None
    """What to judge by; MNLI: dev_matched.tsv. Default: nothing."""
    test_file: str | None = None
    """What to write predictions of too, without answers."""
    epochs: Short[int | None] = None
    """Passes over the examples, from which train_steps follows; default: as many as train_steps makes."""
    pack: bool = True
    """Put several examples in a row, where they do not see each other; else one, and padding."""
    chat_template: str | None = None
    """File of a Jinja template for messages; default: the one beside the tokenizer."""
    lm_weight: float = 0.5
    """Weight of the language-modelling loss beside that of a classifier (GPT-1: 0.5)."""
    layer_decay: float = 1.0
    """Each layer learns at this share of the rate of the one above it; 1: all alike."""
    frozen: tuple[str, ...] = ()
    """Parts that do not learn, by name: embedding, blocks.0-5, blocks.3.mlp, head.norm."""

    def __post_init__(self) -> None:
        paths(self, "base", "train_file", "valid_file", "test_file", "chat_template")
        positive("finetune", self, "epochs", "layer_decay")
        not_negative("finetune", self, "lm_weight")
        require(
            self.layer_decay <= 1,
            f"finetune.layer_decay={self.layer_decay}",
            "must be at most 1: layers far from the task learn slower",
            "0.9 is usual",
            "finetune.layer_decay",
        )
