"""Turn text into token ids: JSON lines, text files or folders → P_text_document.bin, .idx and .json.

examples:
  python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
      --tokenizer gpt2 --vocab-file vocab.json --merge-file merges.txt --append-eod
  python tools/preprocess_data.py --input shards/*.jsonl.zst --output-prefix data/web \\
      --tokenizer sentencepiece --tokenizer-model web.model --append-eod --workers 8
  python tools/preprocess_data.py --input books/ --output-prefix data/books --tokenizer bytes --append-eod

Then train with: deepspeed examples/pretrain_gpt.py --data-path data/corpus_text_document
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megagpt.data.indexed.meta import losses
from megagpt.data.text.prepare import BadLines, Prepared, Progress, TokenizerFiles, prepare
from megagpt.errors import ArgumentParser, home_expanded, run_cli

TOKENIZER_NAMES = {
    "gpt2": "gpt2",
    "sentencepiece": "sentencepiece",
    "hf": "hf",
    "bytes": "bytes",
    # Megatron-LM's names
    "GPT2BPETokenizer": "gpt2",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "HuggingFaceTokenizer": "hf",
    "ByteLevelTokenizer": "bytes",
}


_SHOWN = 20  # of the places that were left out
_FEWEST_TO_SPLIT = 10  # documents of which the default split holds one out


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    started = time.perf_counter()
    with _progress(args.log_interval) as report:
        done = prepare(
            args.input,
            args.output_prefix,
            TokenizerFiles(
                kind=TOKENIZER_NAMES[args.tokenizer],
                model=args.tokenizer_model,
                vocab_file=args.vocab_file,
                merge_file=args.merge_file,
            ),
            keys=args.json_keys,
            append_eod=args.append_eod,
            workers=args.workers,
            input_format=args.input_format,
            max_document_mb=args.max_document_mb,
            overwrite=args.overwrite,
            bad_lines=BadLines(policy=args.on_bad_line, most=args.max_bad_lines),
            report=report,
        )
    seconds = time.perf_counter() - started
    for key, meta in zip(args.json_keys, done.metas, strict=True):
        print(
            f"{args.output_prefix}_{key}_document: {meta.documents:,} documents, {meta.tokens:,} tokens, "
            f"{meta.text_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s"
        )
    for note in _notes(done, args.append_eod):
        print(f"note: {note}", file=sys.stderr)
    return 0


def _notes(done: Prepared, append_eod: bool) -> Iterator[str]:
    """What whoever is going to train on it should know."""
    first = done.metas[0]
    if done.done_before:
        yield f"went on after the {done.done_before:,} files that an earlier call had dealt with"
    if done.bad:
        yield f"left out {len(done.bad):,} lines or files that are no documents:"
        yield from done.bad[:_SHOWN]
        if len(done.bad) > _SHOWN:
            yield f"… and {len(done.bad) - _SHOWN:,} more"
    yield from (f"{found}; another tokenizer may keep it" for found in losses(first))
    if not append_eod and first.eod is not None:
        yield "documents run into one another in training; --append-eod would mark their ends"
    if first.documents < _FEWEST_TO_SPLIT:
        yield (
            f"--split holds out whole documents, so that of {first.documents} the default leaves none for validation; "
            "cut the text into more documents (JSON lines, or files)"
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    _add_input(parser.add_argument_group("input").add_argument)
    _add_tokenizer(parser.add_argument_group("tokenizer").add_argument)
    _add_output(parser.add_argument_group("output").add_argument)
    _add_run(parser.add_argument_group("run").add_argument)
    return parser.parse_args(argv)


def _add_input(add: Callable[..., object]) -> None:
    add(
        "--input", nargs="+", type=home_expanded, required=True, metavar="PATH",
        help="files or folders, read in this order; any file also packed by gzip, bzip2, xz or zstandard. Names in "
        ".jsonl, .json, .ndjson are JSON lines: a line is a document. All else is plain text: a file is a document. "
        "Folders are walked, sorted by path. `-` is standard input, of JSON lines",
    )  # fmt: skip
    add(
        "--json-keys", nargs="+", default=["text"], metavar="KEY",
        help="keys that hold text, a.b for b within a; each becomes its own dataset (default: text)",
    )  # fmt: skip
    add(
        "--input-format", choices=["auto", "jsonl", "text"], default="auto",
        help="do not go by the names (default: auto)",
    )  # fmt: skip
    add(
        "--on-bad-line", choices=["error", "skip"], default="error",
        help="end at a line that is no document and at a damaged file, or leave it out and tell (default: error)",
    )  # fmt: skip
    add(
        "--max-bad-lines", type=_positive, default=1000, metavar="N",
        help="with skip: end all the same after so many (default: 1000)",
    )  # fmt: skip
    add(
        "--max-document-mb", type=_positive, default=64, metavar="MB",
        help="refuse longer documents, which bounds memory: a worker may need 100 times that with hf, "
        "30 times with sentencepiece (default: 64)",
    )  # fmt: skip


def _add_tokenizer(add: Callable[..., object]) -> None:
    add(
        "--tokenizer", "--tokenizer-type", required=True, choices=TOKENIZER_NAMES, metavar="KIND",
        help=f"{', '.join(TOKENIZER_NAMES)} (the long names are Megatron-LM's)",
    )  # fmt: skip
    model = "sentencepiece: X.model; hf: tokenizer.json or its folder"
    add("--tokenizer-model", metavar="FILE", type=home_expanded, help=model)
    add("--vocab-file", metavar="FILE", type=home_expanded, help="gpt2: vocab.json")
    add("--merge-file", metavar="FILE", type=home_expanded, help="gpt2: merges.txt")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token (wanted for GPT)")


def _add_output(add: Callable[..., object]) -> None:
    add(
        "--output-prefix", type=home_expanded, required=True, metavar="P",
        help="writes P_KEY_document.bin, .idx, .json; they appear when complete",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace a dataset of that name, once the new one is complete")


def _add_run(add: Callable[..., object]) -> None:
    add(
        "--workers", type=_positive, default=None, metavar="N",
        help="processes that encode; the output does not depend on it (default: one a core at most)",
    )  # fmt: skip
    add(
        "--log-interval", type=_positive, default=10_000, metavar="N",
        help="documents between progress lines where there is no terminal (default: 10000)",
    )  # fmt: skip


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, wanted 1 or more")
    return value


@contextmanager
def _progress(log_interval: int) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, else a line every log_interval documents; both on stderr."""
    started = time.perf_counter()

    def state(progress: Progress) -> str:
        speed = progress.text_bytes / 1e6 / (time.perf_counter() - started)
        return f"{progress.documents:,} documents  {progress.tokens:,} tokens  {speed:,.1f} MB/s"

    if sys.stderr.isatty():
        with Bar(BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()) as bar:
            task = bar.add_task("reading")
            yield lambda progress: bar.update(
                task, total=progress.total_bytes, completed=progress.stored_bytes, description=state(progress)
            )
        return
    shown = 0

    def line(progress: Progress) -> None:
        nonlocal shown
        if progress.documents >= shown + log_interval:
            shown = progress.documents
            print(state(progress), file=sys.stderr, flush=True)

    yield line


if __name__ == "__main__":
    for _signal in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(_signal, lambda number, _frame: sys.exit(128 + number))  # what is unfinished is removed
    run_cli(main)
