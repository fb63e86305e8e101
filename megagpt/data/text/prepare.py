"""The pipeline: input files → blocks → token ids, in workers → indexed datasets, in the order of the input.

The files written do not depend on the number of workers. What is in memory at a time is a few blocks per
worker, or one document if that is larger.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process

import numpy as np

from megagpt.data.indexed.dataset import IndexedWriter
from megagpt.data.indexed.meta import DatasetMeta
from megagpt.data.indexed.mmididx import dtype_for
from megagpt.data.text.documents import BLOCK_BYTES, Block, Format, InputFile, find_inputs, read_blocks, texts
from megagpt.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megagpt.errors import UserError

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
    text_bytes: int


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
    report: Callable[[Progress], None] = lambda progress: None,
) -> list[DatasetMeta]:
    """Write `{output_prefix}_{key}_document.bin/.idx/.json` for each key; all appear at the end, or none.

    **Raises** `UserError` for input, tokenizer or output that cannot work.
    """
    tokenizer = _tokenizer(tokenizer_files)
    if append_eod:
        _require_eod(tokenizer)
    files = find_inputs(inputs, input_format)
    total_bytes = sum(file.path.stat().st_size for file in files)
    if workers is None:
        workers = min(os.cpu_count() or 1, 1 + total_bytes // _BYTES_WORTH_A_WORKER)
    dtype = dtype_for(tokenizer.vocab_size)
    encode = partial(_encode, tokenizer_files, tuple(keys), append_eod, dtype)
    progress = Progress(total_bytes=total_bytes)
    with ExitStack() as stack:
        names = [f"{output_prefix}_{key}_document" for key in keys]
        writers = [stack.enter_context(IndexedWriter(name, dtype, overwrite=overwrite)) for name in names]
        text_bytes = [0] * len(keys)
        batches = _batches(read_blocks(files, max_document_mb << 20))
        for stored_bytes, results in _in_order(encode, batches, workers):
            for i, (writer, encoded) in enumerate(zip(writers, results, strict=True)):
                writer.add_documents(encoded.tokens, encoded.lengths)
                text_bytes[i] += encoded.text_bytes
            _advance(progress, stored_bytes, results)
            report(progress)
        if not all(writer.n_tokens for writer in writers):
            raise UserError(f"{_name(files)}: no text in it; nothing was written, check --input and --json-keys")
        metas = [_meta(tokenizer, append_eod, w, n) for w, n in zip(writers, text_bytes, strict=True)]
        for writer, meta in zip(writers, metas, strict=True):
            writer.finish(meta)
    return metas


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


def _encode(
    tokenizer_files: TokenizerFiles,
    keys: tuple[str, ...],
    append_eod: bool,
    dtype: np.dtype,
    batch: Sequence[Block],
) -> list[Encoded]:
    """The work of a worker: parse and encode a batch, one result a key."""
    tokenizer = _tokenizer(tokenizer_files)
    columns = zip(*(record for block in batch for record in texts(block, keys)), strict=True)
    results = [_encode_texts(tokenizer, column, append_eod, dtype) for column in columns]
    return results or [_encode_texts(tokenizer, (), append_eod, dtype) for _ in keys]


def _encode_texts(tokenizer: Tokenizer, column: Sequence[str], append_eod: bool, dtype: np.dtype) -> Encoded:
    documents = tokenizer.encode_batch(column)
    end = np.array([tokenizer.eod if append_eod else 0], dtype)
    parts: list[np.ndarray] = []
    for ids in documents:
        parts.append(ids)
        if append_eod and len(ids):  # an empty document stays empty
            parts.append(end)
    lengths = np.array([len(ids) + (append_eod and len(ids) > 0) for ids in documents], np.int64)
    tokens = np.concatenate([part.astype(dtype, copy=False) for part in parts]) if parts else np.zeros(0, dtype)
    text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in column)
    return Encoded(tokens, lengths, text_bytes)


def _batches(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Group small blocks (short files) until they are worth sending."""
    batch: list[Block] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += len(block.data)
        if size >= BLOCK_BYTES or len(batch) == 256:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_order(
    encode: Callable[[Sequence[Block]], list[Encoded]], batches: Iterable[list[Block]], workers: int
) -> Iterator[tuple[int, list[Encoded]]]:
    """(stored bytes of a batch, its result) in the order of the batches, with bounded bytes on the way."""
    if workers == 1:
        yield from ((_stored(batch), encode(batch)) for batch in batches)
        return
    waiting: deque[tuple[int, int, Future[list[Encoded]]]] = deque()
    in_flight, budget = 0, 4 * workers * BLOCK_BYTES
    # "spawn": a forked child would inherit the locks of the caller's threads.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker) as pool:
        try:
            for batch in batches:
                size = sum(len(block.data) for block in batch)
                while waiting and in_flight + size > budget:
                    done_size, stored, future = waiting.popleft()
                    yield stored, future.result()
                    in_flight -= done_size
                waiting.append((size, _stored(batch), pool.submit(encode, batch)))
                in_flight += size
            for _, stored, future in waiting:
                yield stored, future.result()
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


def _stored(batch: Sequence[Block]) -> int:
    return sum(block.stored_bytes for block in batch)


def _advance(progress: Progress, stored_bytes: int, results: Sequence[Encoded]) -> None:
    lengths = results[0].lengths
    progress.documents += int((lengths > 0).sum())
    progress.empty_documents += int((lengths == 0).sum())
    progress.tokens += sum(len(encoded.tokens) for encoded in results)
    progress.text_bytes += sum(encoded.text_bytes for encoded in results)
    progress.stored_bytes += stored_bytes


def _meta(tokenizer: Tokenizer, append_eod: bool, writer: IndexedWriter, text_bytes: int) -> DatasetMeta:
    return DatasetMeta(
        tokenizer=tokenizer.kind,
        tokenizer_files=tuple(str(path.resolve()) for path in tokenizer.files),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=append_eod,
        documents=writer.n_sequences,
        tokens=writer.n_tokens,
        text_bytes=text_bytes,
    )


def _name(files: Sequence[InputFile]) -> str:
    return str(files[0].path) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
