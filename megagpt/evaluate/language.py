"""Texts as a whole: perplexity per token and per word, and bits per UTF-8 byte, by windows.

Two such figures compare only where text, context, windows and what is counted are the same: a task's protocol says so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from megagpt import metrics
from megagpt.config import DataConfig
from megagpt.config.values import Split
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.meta import DatasetMeta
from megagpt.data.indexed.samples import split_bounds
from megagpt.data.indexed.text_bytes import text_bytes
from megagpt.data.tokenizers.tokenizer import other_tokenizer
from megagpt.errors import UserError
from megagpt.evaluate.answers import Answers
from megagpt.evaluate.score import Pair, Score
from megagpt.evaluate.split import SPLITS
from megagpt.evaluate.task import Doc, Figure, Record, Task, json_lines, text_of


@dataclass(frozen=True)
class Passage:
    """A text that is scored, and as its file has it, before a detokeniser."""

    text: str
    original: str


@dataclass(frozen=True)
class Stored:
    """Tokens of a dataset, and what is known of it.  Shapes: tokens [n]."""

    tokens: np.ndarray
    meta: DatasetMeta | None
    prefix: Path


Read = tuple[Sequence[int], Record]
"""Token ids of a text, and what is counted of it: n_words, n_bytes; n_words_after, n_bytes_after a detokeniser."""


def windows(ids: Sequence[int], seq_len: int, stride: int | None = None, *, before: int) -> Iterator[Pair]:
    """Each token once: the first window scores all of its seq_len tokens, after `before`; each later one the last
    `stride` of them, after as much of the text as the model's seq_len places hold.

    stride: None: seq_len, so that windows do not overlap but for the last one, which is filled up with what precedes.
    Source: lm-eval's rolling log-likelihood (which has no stride but seq_len).
    """
    text = [before, *ids]
    starts = range(1 + seq_len, len(text), stride or seq_len)
    for start, end in pairwise([1, *starts, len(text)]):
        if start < end:
            yield text[max(0, end - 1 - seq_len) : start], text[start:end]


@dataclass(frozen=True)
class Windowed:
    """What language modelling asks: the likelihood of each token of a text.

    Records: text; tokens, and of each its logprobs, best, hits (as of `Score`) and n_context, the tokens that the model
    saw before it, as arrays [n_tokens]; logprob, n_tokens, and what is counted of the text.
    how: the protocol but for its windows.  read: ids and counts of documents.
    """

    how: str
    read: Callable[[Answers, Sequence[Doc]], list[Read]]
    stride: int | None = None

    @property
    def protocol(self) -> str:
        """All of it."""
        if self.stride is None:
            return f"{self.how}; windows of the model's context that do not overlap"
        return f"{self.how}; windows of the model's context, each scoring its last {self.stride:,} tokens"

    def __call__(self, answers: Answers, docs: Sequence[Doc], shots: Sequence[Sequence[Doc]]) -> list[Record]:
        """Raises UserError for a stride that the context does not hold.  shots: none (`shots_of`)."""
        if self.stride is not None and not 1 <= self.stride <= answers.seq_len:
            raise UserError(
                f"got --stride {self.stride}", f"wanted 1 to {answers.seq_len:,}, the model's context", "change it"
            )
        found = self.read(answers, docs)
        pairs = [list(windows(ids, answers.seq_len, self.stride, before=answers.empty[-1])) for ids, _ in found]
        scores = iter(answers.scores([pair for some in pairs for pair in some]))
        return [
            _record(ids, counts, some, [next(scores) for _ in some])
            for (ids, counts), some in zip(found, pairs, strict=True)
        ]


def _record(ids: Sequence[int], counts: Record, pairs: Sequence[Pair], scores: Sequence[Score]) -> Record:
    def joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *parts])

    logprobs = joined([score.logprobs for score in scores], np.float32)
    return {
        **counts,
        "n_tokens": len(ids),
        "logprob": float(logprobs.sum(dtype=np.float64)),
        "tokens": np.array(ids, dtype=np.int64),
        "logprobs": logprobs,
        "best": joined([score.best for score in scores], np.float32),
        "hits": joined([score.hits for score in scores], bool),
        "n_context": joined([len(context) + np.arange(len(text)) for context, text in pairs], np.int64),
    }


def strided(task: Task, stride: int | None) -> Task:
    """A task with windows of another stride, if it has windows; its protocol says so."""
    if not isinstance(task.ask, Windowed):
        return task
    ask = replace(task.ask, stride=stride)
    return replace(task, ask=ask, protocol=ask.protocol)


def nats_per(count: str, records: Sequence[Record]) -> float:
    """Loss of all texts for one of what is counted; NaN where nothing is, or its number is not known."""
    n = math.fsum(record[count] for record in records)
    return -math.fsum(record["logprob"] for record in records) / n if n > 0 else math.nan


def perplexity_per(count: str) -> Figure:
    """exp of the loss for one of what is counted."""
    return lambda records: metrics.perplexity(nats_per(count, records))


def bits_per(count: str) -> Figure:
    """The loss for one of what is counted, in bits."""
    return lambda records: nats_per(count, records) / math.log(2)


PPL, BITS = {"ppl": perplexity_per("n_tokens")}, {"bits_per_byte": bits_per("n_bytes")}
WORD_PPL = {"word_ppl": perplexity_per("n_words")}
AFTER = {"word_ppl_after": perplexity_per("n_words_after"), "bits_per_byte_after": bits_per("n_bytes_after")}
"""By words and bytes of the text that the detokeniser made; the others count those of the file."""


def words(text: str) -> int:
    """What blanks part."""
    return len(text.split())


def words_and_line_ends(text: str) -> int:
    """As benchmarks of words count: the end of a line is one more to predict."""
    return words(text) + text.count("\n")


def of_passages(words: Callable[[str], int] = words) -> Callable[[Answers, Sequence[Passage]], list[Read]]:
    """Ids of texts; words and bytes of both the file's text and what is scored.  Shapes: as `Read`."""

    def read(answers: Answers, docs: Sequence[Passage]) -> list[Read]:
        ids = answers.tokenizer.encode_batch([doc.text for doc in docs])
        return [(of_doc.tolist(), _counts(doc, words)) for of_doc, doc in zip(ids, docs, strict=True)]

    return read


def _counts(doc: Passage, words: Callable[[str], int]) -> Record:
    return {
        "text": doc.text,
        "n_words": words(doc.original),
        "n_bytes": len(doc.original.encode()),
        "n_words_after": words(doc.text),
        "n_bytes_after": len(doc.text.encode()),
    }


def text_task(path: str | Path, *, stride: int | None = None) -> Task:
    """`text:PATH`: a file as one stream; of a .jsonl, each line's "text" on its own."""
    path = Path(path).expanduser().absolute()
    lines = path.suffix == ".jsonl"
    ask = Windowed('each "text" with its own context' if lines else "the file as one stream", of_passages(), stride)
    return Task(
        name=f"text:{path.name}",
        about="the text of a file",
        protocol=ask.protocol,
        source=str(path),
        files=(str(path),),
        read=(lambda paths: _passages(doc["text"] for doc in json_lines(paths, "text")))
        if lines
        else (lambda paths: _passages([text_of(paths[0])])),
        ask=ask,
        figures=PPL | WORD_PPL | BITS,
    )


def _passages(texts: Iterator[str] | Sequence[str]) -> list[Passage]:
    return [Passage(text, text) for text in texts if text]


def dataset_task(
    prefix: str | Path,
    which: str | None = None,
    *,
    shares: Split | None = None,
    documents: bool = False,
    stride: int | None = None,
) -> Task:
    """`dataset:PREFIX[:SPLIT]`: tokens of an indexed dataset as they are, as one stream, or each document on its own.

    which: train, validation or test by the shares (None: those that training has by default); None: all of it.
    Raises UserError for another name of a split.
    """
    if which not in (None, *SPLITS):
        raise UserError(f"got the split {which} of {prefix}", f"wanted {', '.join(SPLITS)}", "name one, or none")
    prefix, split = Path(prefix).expanduser().absolute(), shares or DataConfig().split
    part = f", {which} of split {split}" if which else ""
    how = "each document with its own context" if documents else "documents as one stream"
    ask = Windowed(f"{how}{part}; bytes of the text that was tokenized", of_stored, stride)

    def read(_: Sequence[Path]) -> list[Stored]:
        dataset = IndexedDataset(prefix)
        first, end = split_bounds(split, len(dataset))[SPLITS.index(which)] if which else (0, len(dataset))
        parts = [part for part in map(dataset.get, range(first, end)) if len(part)]
        if parts and not documents:
            parts = [np.concatenate(parts)]
        return [Stored(part, dataset.meta, prefix) for part in parts]

    return Task(
        name=f"dataset:{prefix.name}" + (f":{which}" if which else ""),
        about="the tokens of a dataset",
        protocol=ask.protocol,
        source=str(prefix),
        files=(f"{prefix}.bin", f"{prefix}.idx"),
        read=read,
        ask=ask,
        figures=BITS | PPL | WORD_PPL,
    )


def of_stored(answers: Answers, docs: Sequence[Stored]) -> list[Read]:
    """Ids of a dataset, and the words and bytes that they stand for.  Raises UserError for ids of another tokenizer."""
    tokenizer, first = answers.tokenizer, docs[0]
    if answers.speaks and (note := other_tokenizer(tokenizer, first.meta)):
        print(f"note: {first.prefix}: {note}", file=sys.stderr)
    sizes, largest = tokenizer.token_bytes(), max(int(doc.tokens.max()) for doc in docs)
    if largest >= len(sizes):
        raise UserError(
            f"{first.prefix} has token id {largest}",
            f"wanted 0 to {len(sizes) - 1}, those of the model's tokenizer",
            "give a dataset of its own tokenizer",
        )
    found = []
    for doc in docs:
        n_bytes, text = text_bytes(doc.tokens, doc.meta, tokenizer, sizes), tokenizer.decode(doc.tokens.tolist())
        counts = {"text": text, "n_words": words(text), "n_bytes": math.nan if n_bytes is None else n_bytes}
        found.append((doc.tokens.tolist(), counts))
    return found
