"""The pipeline: input files → blocks → token ids, in workers → indexed datasets, in the order of the input.

The files written do not depend on the number of workers. What is in memory at a time is a few blocks per
worker, or one document if that is larger.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from typing import Literal

import numpy as np

from megagpt.data.indexed.dataset import IndexedWriter, Mark, Position
from megagpt.data.indexed.meta import DatasetMeta
from megagpt.data.indexed.mmididx import dtype_for
from megagpt.data.text.documents import BLOCK_BYTES, Block, InputFile, Tell, find_inputs, read_blocks, texts
from megagpt.data.text.first_look import Format
from megagpt.data.text.kept import Kept, identity, kept_path, read_kept, write_kept
from megagpt.data.text.measured import Measured, measure
from megagpt.data.text.packed import STANDARD_INPUT
from megagpt.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megagpt.errors import UserError

_MARK_EVERY_S = 1.0  # what a killed call has done after the last mark is done again
_BYTES_WORTH_A_WORKER = 16 << 20  # a process starts in the time in which it encodes some MB


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """Which tokenizer to build: what a worker process is told."""

    kind: str
    model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None


@dataclass(kw_only=True)
class Progress:
    """How far a run is."""

    documents: int = 0
    """Documents with text in them, under the first key."""
    empty_documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    stored_bytes: int = 0
    """Bytes of the input files, as stored, that have been dealt with."""
    total_bytes: int = 0
    """Bytes of the input files, as stored."""


@dataclass
class Encoded:
    """What becomes of a batch under one key. **Shapes**: tokens [sum of lengths], lengths [documents]."""

    tokens: np.ndarray
    lengths: np.ndarray
    measured: Measured


@dataclass(frozen=True)
class Batch:
    """Blocks under all keys. bad: what was left out of them, in words."""

    encoded: list[Encoded]
    bad: list[str]


@dataclass(frozen=True, kw_only=True)
class BadLines:
    """What to do with lines and files that are no documents: end, or leave out up to `most` of them."""

    policy: Literal["error", "skip"] = "error"
    most: int = 1000


@dataclass(frozen=True)
class Prepared:
    """metas: one a dataset. bad: what was left out. done_before: files that an earlier call had dealt with."""

    metas: list[DatasetMeta]
    bad: list[str]
    done_before: int


@dataclass
class _Job:
    """A call in progress. ended: files that are done; and where everything was then, in case that it ends early."""

    names: Sequence[str]
    settings: str
    files: Sequence[InputFile]
    writers: Sequence[IndexedWriter]
    measured: list[Measured]
    bad: list[str]
    most_bad: int
    ended: int = 0
    at: tuple[list[Position], list[Measured], list[str]] | None = field(default=None)
    marked_at_s: float = field(default_factory=time.monotonic)

    def add(self, batch: Batch) -> None:
        """Write what became of a batch, and count it."""
        self.leave_out(batch.bad)
        for writer, measured, encoded in zip(self.writers, self.measured, batch.encoded, strict=True):
            writer.add_documents(encoded.tokens, encoded.lengths)
            measured.add(encoded.measured)

    def leave_out(self, bad: Sequence[str]) -> None:
        """Raises UserError where it is too much."""
        self.bad += bad
        if len(self.bad) > self.most_bad:
            raise UserError(
                f"{self.bad[self.most_bad]}: more than {self.most_bad} lines or files are bad; is it the right input? "
                "--max-bad-lines sets the limit"
            )

    def end_of_file(self, number: int) -> None:
        """All up to file `number` is written."""
        if not any(file.path == STANDARD_INPUT for file in self.files[:number]):
            self.ended = number
            measured = [replace(m, lost_bytes=dict(m.lost_bytes)) for m in self.measured]
            self.at = [writer.position() for writer in self.writers], measured, list(self.bad)

    def keep(self) -> str:
        """Keep the files that are done for a later call; says so, or nothing where there is nothing to keep."""
        if not self._write_kept(IndexedWriter.keep):
            return ""
        done = f"{self.ended} of {len(self.files)} files are done and kept (*.partial)"
        return f"; {done}: the same command goes on after them"

    def keep_if_killed(self) -> None:
        """Write down now and then which files are done, since a killed call cannot do it at its end."""
        if time.monotonic() - self.marked_at_s >= _MARK_EVERY_S:
            self._write_kept(IndexedWriter.mark)
            self.marked_at_s = time.monotonic()

    def _write_kept(self, mark: Callable[[IndexedWriter, Position], Mark]) -> bool:
        """Whether there was something to keep, and it could be written."""
        if self.at is None:
            return False
        positions, measured, bad = self.at
        try:
            marks = [mark(writer, at) for writer, at in zip(self.writers, positions, strict=True)]
            kept = Kept(self.settings, identity(self.files[: self.ended]), marks, measured, bad)
            write_kept(self.names[0], kept)
        except OSError:
            return False
        return True


def prepare(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer_files: TokenizerFiles,
    *,
    keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int | None = None,
    input_format: Format = "auto",
    max_document_mb: int = 64,
    overwrite: bool = False,
    bad_lines: BadLines = BadLines(),
    report: Callable[[Progress], None] = lambda progress: None,
) -> Prepared:
    """Write `{output_prefix}_{key}_document.bin/.idx/.json` for each key; all appear at the end, or none.

    Where it ends early, the input files that are done are kept, and a call that is to do the same goes on after them.

    **Raises** `UserError` for input, tokenizer or output that cannot work.
    """
    tokenizer = _tokenizer(tokenizer_files)
    if append_eod:
        _require_eod(tokenizer)
    bad: list[UserError] = []
    tell = bad.append if bad_lines.policy == "skip" else None
    files = find_inputs(inputs, input_format, keys, tell)
    names = [f"{output_prefix}_{key}_document" for key in keys]
    dtype = dtype_for(tokenizer.vocab_size)
    rules = [tokenizer.kind, tokenizer.sha256, tuple(keys), append_eod, input_format, max_document_mb, bad_lines.policy]
    settings = hashlib.sha256(json.dumps(rules).encode()).hexdigest()
    with ExitStack() as stack:
        job = _begin(stack, names, settings, files, dtype, overwrite, bad_lines.most)
        done_before = job.ended
        batches = _batches(read_blocks(files[job.ended :], max_document_mb << 20, tell))
        encode = partial(_encode, tokenizer_files, tuple(keys), append_eod, dtype, bad_lines.policy)
        n_bytes = sum(file.n_bytes for file in files[job.ended :])
        results = _in_order(encode, batches, workers or _workers(files, n_bytes))
        _carry_out(job, results, lambda: job.leave_out(_told(bad)), Progress(total_bytes=n_bytes), report)
        if not all(writer.n_tokens for writer in job.writers):
            raise UserError(f"{_name(files)}: no text in it; nothing was written, check --input and --json-keys")
        metas = [_meta(tokenizer, append_eod, w, m) for w, m in zip(job.writers, job.measured, strict=True)]
        for writer, meta in zip(job.writers, metas, strict=True):
            writer.finish(meta)
    kept_path(names[0]).unlink(missing_ok=True)
    return Prepared(metas, list(dict.fromkeys(job.bad)), done_before)


def _begin(
    stack: ExitStack,
    names: Sequence[str],
    settings: str,
    files: Sequence[InputFile],
    dtype: np.dtype,
    overwrite: bool,
    most_bad: int,
) -> _Job:
    """A job at its beginning, or after the files that an earlier call has kept. stack: closes what it writes."""
    kept = read_kept(names[0], settings, files)
    marks = kept.marks if kept else [None] * len(names)
    writers = [
        stack.enter_context(IndexedWriter(name, dtype, overwrite=overwrite, after=mark))
        for name, mark in zip(names, marks, strict=True)
    ]
    if kept is None:
        kept_path(names[0]).unlink(missing_ok=True)  # what it was about is overwritten
        return _Job(names, settings, files, writers, [Measured() for _ in names], [], most_bad)
    job = _Job(names, settings, files, writers, kept.measured, kept.bad, most_bad)
    job.end_of_file(len(kept.files))
    return job


def _carry_out(
    job: _Job,
    results: Iterable[tuple[_Blocks, Batch]],
    count_bad_files: Callable[[], None],
    progress: Progress,
    report: Callable[[Progress], None],
) -> None:
    """Write all results; where it ends early, keep what is done."""
    try:
        for blocks, batch in results:
            count_bad_files()
            job.add(batch)
            if blocks.files_ended:
                job.end_of_file(blocks.files_ended)
                job.keep_if_killed()
            _advance(progress, blocks.stored_bytes, batch.encoded)
            report(progress)
        count_bad_files()
    except UserError as error:
        raise UserError(f"{error}{job.keep()}") from None
    except BaseException:  # Ctrl-C, SIGTERM
        job.keep()
        raise


def _workers(files: Sequence[InputFile], total_bytes: int) -> int:
    """As many as there is work for; all cores where nobody knows how much will come in."""
    n_cores = os.cpu_count() or 1
    unknown = any(file.path == STANDARD_INPUT for file in files)
    return n_cores if unknown else min(n_cores, 1 + total_bytes // _BYTES_WORTH_A_WORKER)


def _told(errors: list[UserError]) -> list[str]:
    """What was told so far, without the remedies; and nothing is pending any more."""
    told = [str(error).rpartition("; ")[0] or str(error) for error in errors]
    errors.clear()
    return told


def _require_eod(tokenizer: Tokenizer) -> None:
    if tokenizer.eod is None:
        raise UserError(
            f"--append-eod: tokenizer {tokenizer.kind} ({', '.join(map(str, tokenizer.files))}) has no "
            "end-of-text token; leave the option out, or take a tokenizer that has one"
        )


@lru_cache(maxsize=1)
def _tokenizer(files: TokenizerFiles) -> Tokenizer:
    """Built once in each process."""
    return build_tokenizer(files.kind, model=files.model, vocab_file=files.vocab_file, merge_file=files.merge_file)


@lru_cache(maxsize=1)
def _sizes(files: TokenizerFiles) -> np.ndarray:
    return _tokenizer(files).token_bytes()


def _encode(
    tokenizer_files: TokenizerFiles,
    keys: tuple[str, ...],
    append_eod: bool,
    dtype: np.dtype,
    policy: str,
    blocks: Sequence[Block],
) -> Batch:
    """The work of a worker: parse and encode blocks, one result a key."""
    bad: list[UserError] = []
    tell: Tell | None = bad.append if policy == "skip" else None
    columns = [*zip(*(record for block in blocks for record in texts(block, keys, tell)), strict=True)]
    encode = partial(_encode_texts, tokenizer_files, append_eod, dtype)
    return Batch([encode(column) for column in columns or [()] * len(keys)], _told(bad))


def _encode_texts(files: TokenizerFiles, append_eod: bool, dtype: np.dtype, column: Sequence[str]) -> Encoded:
    tokenizer = _tokenizer(files)
    documents = tokenizer.encode_batch(column)
    end = np.array([tokenizer.eod if append_eod else 0], dtype)
    parts: list[np.ndarray] = []
    for ids in documents:
        parts.append(ids)
        if append_eod and len(ids):  # an empty document stays empty
            parts.append(end)
    lengths = np.array([len(ids) + (append_eod and len(ids) > 0) for ids in documents], np.int64)
    tokens = np.concatenate([part.astype(dtype, copy=False) for part in parts]) if parts else np.zeros(0, dtype)
    return Encoded(tokens, lengths, measure(tokenizer, _sizes(files), column, tokens))


def _batches(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Group small blocks (short files) until they are worth sending; the end of a long file ends a group."""
    batch: list[Block] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += len(block.data)
        if size >= BLOCK_BYTES or len(batch) == 256 or (block.ends_file and block.first_line > 1):
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class _Blocks:
    """Of a batch: its bytes, as stored; and how many files of the input are done where one ends with it, else 0."""

    stored_bytes: int
    files_ended: int


def _about(batch: Sequence[Block]) -> _Blocks:
    last = batch[-1]
    return _Blocks(sum(block.stored_bytes for block in batch), last.file.number + 1 if last.ends_file else 0)


def _in_order(
    encode: Callable[[Sequence[Block]], Batch], batches: Iterable[list[Block]], workers: int
) -> Iterator[tuple[_Blocks, Batch]]:
    """Each batch and its result in the order of the batches, with bounded bytes on the way."""
    if workers == 1:
        yield from ((_about(batch), encode(batch)) for batch in batches)
        return
    waiting: deque[tuple[int, _Blocks, Future[Batch]]] = deque()
    in_flight, budget = 0, 4 * workers * BLOCK_BYTES
    # "spawn": a forked child would inherit the locks of the caller's threads.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker) as pool:
        try:
            for batch in batches:
                size = sum(len(block.data) for block in batch)
                while waiting and in_flight + size > budget:
                    done_size, blocks, future = waiting.popleft()
                    yield blocks, future.result()
                    in_flight -= done_size
                waiting.append((size, _about(batch), pool.submit(encode, batch)))
                in_flight += size
            for _, blocks, future in waiting:
                yield blocks, future.result()
        except BrokenProcessPool:
            raise UserError("a worker process died, perhaps for want of memory; use fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    """Ctrl-C is for the parent; and a parent that is killed leaves no workers behind, who would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _advance(progress: Progress, stored_bytes: int, results: Sequence[Encoded]) -> None:
    lengths = results[0].lengths
    progress.documents += int((lengths > 0).sum())
    progress.empty_documents += int((lengths == 0).sum())
    progress.tokens += sum(len(encoded.tokens) for encoded in results)
    progress.text_bytes += sum(encoded.measured.text_bytes for encoded in results)
    progress.stored_bytes += stored_bytes


def _meta(tokenizer: Tokenizer, append_eod: bool, writer: IndexedWriter, measured: Measured) -> DatasetMeta:
    return DatasetMeta(
        tokenizer=tokenizer.kind,
        tokenizer_files=tuple(str(path.resolve()) for path in tokenizer.files),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=append_eod,
        documents=writer.n_sequences,
        tokens=writer.n_tokens,
        text_bytes=measured.text_bytes,
        token_text_bytes=measured.token_text_bytes,
        unknown_tokens=measured.unknown_tokens,
        lost_share=measured.lost_share,
        lost_characters=measured.lost_characters,
    )


def _name(files: Sequence[InputFile]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
