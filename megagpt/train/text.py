"""Pretraining: a run on text, shuffled and cut into samples, and judged by the loss of text that is held out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from megagpt import metrics
from megagpt.checkpoint.state import DataState, State
from megagpt.config import DataConfig, RunConfig
from megagpt.data.indexed.blend import Samples, build_splits, sources
from megagpt.data.indexed.dataset import verify
from megagpt.data.indexed.index_builder import fallback_note
from megagpt.data.indexed.text_bytes import text_bytes
from megagpt.data.opened import OpenedData
from megagpt.data.tokenizers.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.schedule import Schedule
from megagpt.train.loop import train
from megagpt.train.remarks import remarks
from megagpt.train.run import Run, batches_of
from megagpt.train.source import AnySamples, Source, Validation
from megagpt.train.step.engine import Engine


def train_on_text(config: RunConfig, data: OpenedData) -> None:
    """Pretrain on the processes that were started.  Raises as `train` does."""
    train(config, Text(data))


class Text(Source):
    """The datasets of data.data_path."""

    def __init__(self, data: OpenedData) -> None:
        self.data = data

    def samples(self, config: RunConfig) -> tuple[AnySamples, AnySamples | None]:
        n_train = Schedule(config).samples_before(config.train.train_steps)
        counts = (n_train, config.log.eval_steps * config.train.global_batch_size, 0)
        weights, split = config.data.data_path.weights, config.data.split
        train_samples, valid_samples, _ = build_splits(
            self.data.datasets, weights, split, config.model.seq_len, config.train.seed, counts
        )
        if train_samples is None:
            remedy = "give it a first share above 0"
            raise UserError(f"data.split={split}", "leaves nothing to train on", remedy, ["data.split"])
        if valid_samples is None:
            _require_no_validation(config, sum(map(len, self.data.datasets)))
        return train_samples, valid_samples

    def tokenizer(self, config: RunConfig) -> Tokenizer | None:
        tokenizer = self.data.tokenizers[0]
        if tokenizer is None and config.log.sample_prompts:
            key, remedy = "log.sample_prompts", "leave them out, or name the tokenizer: --tokenizer"
            raise UserError(key, "are texts, but the data have no tokenizer", remedy, [key])
        return tokenizer

    def identity(self, config: RunConfig, samples: AnySamples, tokenizer: Tokenizer | None) -> DataState:
        assert isinstance(samples, Samples)
        return {
            "data_path": config.data.data_path.words,
            "index_sha256": [dataset.idx_sha256 for dataset in sources(samples)],
            "split": str(config.data.split),
            "tokenizer_sha256": tokenizer.sha256 if tokenizer else None,
        }

    def verify(self, config: RunConfig) -> None:
        # On one rank of each machine, which may have its own copy.
        if config.data.verify and os.environ.get("LOCAL_RANK", "0") == "0":
            for dataset in self.data.datasets:
                verify(dataset, config.model.vocab)

    def lines(self, run: Run) -> Iterator[str]:
        assert isinstance(run.train_samples, Samples)
        if note := fallback_note():
            yield note
        for dataset in sources(run.train_samples):
            if dataset.meta is None:
                yield (
                    f"note: {dataset.prefix} has no .json beside it, as preprocess_data.py writes it: of the index "
                    "only the structure was checked, not the hash"
                )

    def remarks(self, run: Run, schedule: Schedule, resumed: State | None) -> Iterator[str]:
        return remarks(run, schedule, resumed)

    def begin(self, run: Run, engine: Engine, say: Callable[[str], None]) -> None:
        """The seed draws them."""

    def validate(self, run: Run, engine: Engine, step: int) -> Validation | None:
        """Mean loss over eval_steps global batches, always the same ones, and bits per byte of their text."""
        samples = run.valid_samples
        if samples is None:
            return None
        eval_steps, seq_len, bits = run.config.log.eval_steps, run.config.model.seq_len, None
        positions = range(eval_steps * run.config.train.global_batch_size)
        batches = batches_of(run, samples, positions, seq_len)
        loss = engine.evaluate(batches, eval_steps * run.plan.micro_batches)
        tokenizer = run.tokenizer if run.mesh.rank == 0 else None
        if tokenizer is not None and (n_bytes := _text_bytes(samples, positions, tokenizer)):
            bits = metrics.bits_per_byte(loss, len(positions) * seq_len, n_bytes)
        return Validation(loss, bits)


def _require_no_validation(config: RunConfig, n_documents: int) -> None:
    """Raises UserError where the run was asked for what needs validation, and nothing is held out for it."""
    split, default = config.data.split, DataConfig().split
    remedy = "cut the text into more documents, or give validation a larger share"
    if config.checkpoint.keep_best:
        got = f"checkpoint.keep_best with split {split} of {n_documents} documents, eval_steps={config.log.eval_steps}"
        raise UserError(
            got, "has no validation to go by", f"{remedy}, or drop --checkpoint.keep-best", ["checkpoint.keep_best"]
        )
    if config.log.eval_steps and split.shares[1] > 0 and split != default:
        got = f"data.split={split}"
        wanted = f"leaves none of {n_documents} documents for validation"
        raise UserError(got, wanted, f"{remedy}, or --eval-steps 0", ["data.split"])


def _text_bytes(samples: AnySamples, positions: range, tokenizer: Tokenizer) -> float | None:
    """Bytes of the text that the labels of these samples stand for; None where that cannot be known."""
    assert isinstance(samples, Samples)
    sizes, total = tokenizer.token_bytes(), 0.0
    for i in positions:
        found = text_bytes(samples[i][1:], samples.dataset_of(i).meta, tokenizer, sizes)
        if found is None:
            return None
        total += found
    return total
