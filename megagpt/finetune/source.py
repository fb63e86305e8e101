"""The examples of a task as what a run trains on and is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megagpt.checkpoint.state import DataState, State
from megagpt.config import RunConfig
from megagpt.data.tokenizers.tokenizer import Tokenizer
from megagpt.finetune.packing import first_rows, packed
from megagpt.finetune.result import is_best, write_predictions, write_result
from megagpt.finetune.rows import PackedRows
from megagpt.finetune.task import Classification
from megagpt.model.gpt import Head
from megagpt.processes.agree import together
from megagpt.schedule import Schedule
from megagpt.train.loop import train
from megagpt.train.run import Run, batches_of
from megagpt.train.source import AnySamples, Source, Validation

if TYPE_CHECKING:
    from megagpt.finetune.start import Found, Work
    from megagpt.train.step.engine import Engine


def train_on_examples(config: RunConfig, work: Work) -> None:
    """Fine-tune on the processes that were started.  Raises as `train` does."""
    train(config, ExampleSource(work))


class ExampleSource(Source):
    """The files of a task, read and tokenized."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._tests: PackedRows | None = None

    def samples(self, config: RunConfig) -> tuple[AnySamples, AnySamples | None]:
        """For training as many rows as the steps read; for validation each example once."""
        work, asks, seq_len = self.work, self.work.task.n_classes > 0, config.model.seq_len
        n_rows = Schedule(config).samples_before(config.train.train_steps)
        rows = first_rows(work.train.lengths, seq_len, config.train.seed, config.finetune.pack, n_rows)
        valid = _once(work.valid, config, asks) if work.valid and config.log.eval_steps else None
        self._tests = _once(work.test, config, asks) if work.test else None
        return PackedRows(work.train.examples, rows, seq_len, asks), valid

    def tokenizer(self, config: RunConfig) -> Tokenizer | None:
        return self.work.tokenizer

    def identity(self, config: RunConfig, samples: AnySamples, tokenizer: Tokenizer | None) -> DataState:
        files = [found for found in (self.work.train, self.work.valid) if found]
        return {
            "data_path": [found.examples.path for found in files],
            "index_sha256": [found.examples.sha256 for found in files],
            "tokenizer_sha256": tokenizer.sha256 if tokenizer else None,
        }

    def verify(self, config: RunConfig) -> None:
        """Their examples were read already."""

    def lines(self, run: Run) -> Iterator[str]:
        for name, found in (("train", self.work.train), ("valid", self.work.valid), ("test", self.work.test)):
            if found:
                tokens = int(found.lengths.sum())
                yield f"{name}: {len(found.lengths):,} examples, {tokens:,} tokens: {found.examples.path}"
        assert isinstance(run.train_samples, PackedRows)
        n_examples, n_rows = sum(map(len, run.train_samples.rows)), max(1, len(run.train_samples))
        yield f"{n_examples / n_rows:.1f} examples in a row of {run.config.model.seq_len} tokens, {n_rows:,} rows"

    def remarks(self, run: Run, schedule: Schedule, resumed: State | None) -> Iterator[str]:
        for found in filter(None, (self.work.train, self.work.valid, self.work.test)):
            yield from found.examples.notes
        yield from schedule.remarks()
        was = resumed.data.get("index_sha256") if resumed else None
        if resumed and was != run.data_identity.get("index_sha256"):
            yield f"other examples: the run was on {', '.join(resumed.data.get('data_path', []))}"

    def begin(self, run: Run, engine: Engine, say: Callable[[str], None]) -> None:
        if self.work.base is not None and run.config.finetune.weights:
            self.work.base.fill(engine, say)

    def validate(self, run: Run, engine: Engine, step: int) -> Validation | None:
        """Loss over all of the file; of a classifier also what the task is measured by, and predictions where best."""
        rows, task = run.valid_samples, self.work.task
        if not isinstance(rows, PackedRows):
            return None
        loss, scores_NC = _evaluated(run, engine, rows)
        if scores_NC is None or not isinstance(task, Classification):
            return Validation(loss)
        figures = task.figures(scores_NC, rows.examples) if np.isfinite(scores_NC).all() else {}
        if not figures:
            return Validation(loss)
        score = float(np.mean(list(figures.values())))
        if together(lambda: is_best(run.folder, step, score)):
            self._write(run, engine, step, task, score, figures, scores_NC)
        return Validation(loss, figures=figures, score=score)

    def _write(
        self,
        run: Run,
        engine: Engine,
        step: int,
        task: Classification,
        score: float,
        figures: Mapping[str, float],
        scores_NC: np.ndarray,
    ) -> None:
        """Predictions of the best step so far, and then its result."""
        tested = _evaluated(run, engine, self._tests)[1] if self._tests else None
        settings = run.config.finetune
        about = {
            "task": settings.task,
            "base": settings.base,
            "weights": settings.weights,
            "seed": run.config.train.seed,
        }

        def write() -> None:
            write_predictions(run.folder, "valid", task.predictions(scores_NC))
            if tested is not None:
                write_predictions(run.folder, "test", task.predictions(tested))
            write_result(run.folder, step, score, figures, about)

        together(lambda: write() if run.mesh.rank == 0 else None)


def _once(found: Found, config: RunConfig, asks: bool) -> PackedRows:
    """Each example once, in the order of the file, with as many empty rows as make whole batches."""
    rows = list(packed(found.lengths, range(len(found.lengths)), config.model.seq_len, config.finetune.pack))
    rows += [[] for _ in range(-len(rows) % config.train.global_batch_size)]
    return PackedRows(found.examples, rows, config.model.seq_len, asks)


def _evaluated(run: Run, engine: Engine, rows: PackedRows) -> tuple[float, np.ndarray | None]:
    """Mean loss, and a classifier's scores of each example, (N, C), the same on every rank.

    Comm: the engine's, and an all-gather of the scores.
    """
    n_micro_batches = len(rows) // (run.config.train.micro_batch_size * run.plan.dp)
    batches = batches_of(run, rows, range(len(rows)), run.config.model.seq_len)
    head = dict(engine.backend.layers).get("head")
    if not rows.asks:
        return engine.evaluate(batches, n_micro_batches), None
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    if isinstance(head, Head):
        head.on_answers = lambda examples_N, scores_NC: seen.append((examples_N.cpu(), scores_NC.cpu()))
    try:
        loss = engine.evaluate(batches, n_micro_batches)
    finally:
        if isinstance(head, Head):
            head.on_answers = None
    return loss, _gathered(seen, len(rows.examples.found), run.config.model.n_classes)


def _gathered(seen: list[tuple[torch.Tensor, torch.Tensor]], n_examples: int, n_classes: int) -> np.ndarray:
    mine = [(examples_N.tolist(), scores_NC.tolist()) for examples_N, scores_NC in seen]
    ranks: list[list[tuple[list[int], list[list[float]]]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    scores_NC = np.full((n_examples, n_classes), np.nan)
    for examples, scores in (found for rank in reversed(ranks) for found in rank):  # of equals, the first rank's
        scores_NC[examples] = np.reshape(scores, (-1, n_classes))
    return scores_NC
