"""Writing text beside transformers' `generate` with the same weights, in turn, in one run; and beside a copy of memory.

    python -m benchmarks.generate                                     every row, some minutes on 2 cores
    python -m benchmarks.generate --shapes tiny --precisions fp32     some of them
    python -m benchmarks.generate --json benchmarks/results/generate-here.json

Prefill: tokens of prompts a second. Decode: tokens written a second, by all texts of the batch together. share: bytes
of weights and cache that a step reads, over the time that it takes, as a part of the measured rate at which memory is
read for a copy. benchmarks/README.md says how to read it.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.machine import conditions
from megagpt.config import ModelConfig
from megagpt.errors import ArgumentParser, run_cli
from megagpt.generate.engine import Engine
from megagpt.generate.limits import Limits, row_bytes
from megagpt.generate.request import Request, Sampling
from megagpt.generate.trained import DTYPES, Trained, open_trained
from megagpt.hf import hf_config

SHAPES = {
    "tiny": ModelConfig(n_layers=4, d_model=128, n_heads=4, seq_len=512, vocab_size=4096),
    "124M": ModelConfig(n_layers=12, d_model=768, n_heads=12, seq_len=1024, vocab_size=50257),
}
BATCHES = (1, 16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_PROMPT = 64
ROUNDS = 5  # of ours and theirs in turn; the median counts


@dataclass(frozen=True)
class Row:
    """One comparison. Rates are medians over rounds; ratio: ours over theirs, median of the rounds' own ratios."""

    shape: str
    precision: str
    batch: int
    prefill_tokens_s: float
    prefill_ratio: float
    decode_tokens_s: float
    decode_ratio: float
    share_of_copy: float


def main() -> None:
    """Print the table, and write the JSON."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--n-tokens", type=int, default=32, help="to write in a round (default: 32)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each, in turn (default: {ROUNDS})")
    parser.add_argument("--json", type=Path, help="where the figures go")
    a = parser.parse_args()
    rows, copied = [], copy_rate()
    print(f"memory is read at {copied / 1e9:.1f} GB/s for a copy", file=sys.stderr, flush=True)
    for shape in a.shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_model(SHAPES[shape], Path(folder))
            for precision in a.precisions:
                rows += compare(shape, precision, Path(folder), a.batches, a.n_tokens, a.rounds, copied)
                show(rows)
    if a.json:
        found = conditions("benchmarks.generate", DEVICE)
        found |= {"copy_bytes_s": copied, "rows": [asdict(row) for row in rows]}
        a.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_model(config: ModelConfig, folder: Path) -> None:
    """A model of random weights, as transformers writes it."""
    from transformers import GPT2Config, GPT2LMHeadModel  # after the flags: seconds

    GPT2LMHeadModel(GPT2Config(**hf_config(config, "gpt2"))).save_pretrained(folder)


def compare(
    shape: str, precision: str, folder: Path, batches: list[int], n_tokens: int, rounds: int, copied: float
) -> list[Row]:
    """Both on the same prompts, in turn."""
    from transformers import AutoModelForCausalLM  # after the flags: seconds

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).to(DEVICE).eval()
    rows = []
    with open_trained(folder, precision=precision) as trained:
        for batch in batches:
            prompts_BT = torch.randint(0, SHAPES[shape].vocab, (batch, N_PROMPT), device=DEVICE)
            runs = (partial_run(ours_once, trained, prompts_BT), partial_run(theirs_once, theirs, prompts_BT))
            rows.append(row(shape, precision, batch, timed(*runs, n_tokens, rounds), trained, n_tokens, copied))
    return rows


Once = Callable[[int], float]
"""Write so many tokens to each prompt; returns the seconds that took."""


def partial_run(once: Callable[[Any, torch.Tensor, int], float], model: Any, prompts_BT: torch.Tensor) -> Once:
    """Of one model and its prompts."""
    return lambda n_tokens: once(model, prompts_BT, n_tokens)


def ours_once(trained: Trained, prompts_BT: torch.Tensor, n_tokens: int) -> float:
    """By our engine, its cache made anew."""
    sampling = Sampling(n_tokens=n_tokens, temperature=0)
    start = time.perf_counter()
    engine = Engine(trained.stage, Limits(n_rows=len(prompts_BT), n_places=N_PROMPT + n_tokens))
    for prompt in prompts_BT.tolist():
        engine.add(Request(tuple(prompt), sampling))
    while not engine.idle:
        engine.step()  # the tokens come to the host
    return time.perf_counter() - start


def theirs_once(model: Any, prompts_BT: torch.Tensor, n_tokens: int) -> float:
    """By transformers."""
    settings = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False, "pad_token_id": 0}
    start = time.perf_counter()
    model.generate(prompts_BT, attention_mask=torch.ones_like(prompts_BT), **settings).cpu()
    return time.perf_counter() - start


def timed(ours: Once, theirs: Once, n_tokens: int, rounds: int) -> list[list[tuple[float, float]]]:
    """By round, of ours and theirs: seconds of the first token, and of all those after it."""
    for once in (ours, theirs):
        once(2)
    found = []
    for _ in range(rounds):
        first = [once(1) for once in (ours, theirs)]
        whole = [once(1 + n_tokens) for once in (ours, theirs)]
        found.append([(one, all_ - one) for one, all_ in zip(first, whole, strict=True)])
    return found


def row(
    shape: str,
    precision: str,
    batch: int,
    found: list[list[tuple[float, float]]],
    trained: Trained,
    n_tokens: int,
    copied: float,
) -> Row:
    """The medians."""
    prefill = statistics.median(ours[0] for ours, _ in found)
    decode = statistics.median(ours[1] for ours, _ in found)
    weights = sum(p.numel() * p.element_size() for p in trained.stage.parameters())
    read = weights + batch * row_bytes(trained.stage, N_PROMPT + n_tokens // 2)
    return Row(
        shape,
        precision,
        batch,
        batch * N_PROMPT / prefill,
        statistics.median(theirs[0] / ours[0] for ours, theirs in found),
        batch * n_tokens / decode,
        statistics.median(theirs[1] / ours[1] for ours, theirs in found),
        read * n_tokens / decode / copied,
    )


def copy_rate(n_bytes: int = 512 << 20) -> float:
    """Bytes a second that a copy reads and writes, the best of five."""
    source = torch.ones(n_bytes // 4, device=DEVICE)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n_bytes / best


def show(rows: list[Row]) -> None:
    """What is known by now."""
    table = Table(box=SIMPLE_HEAD, title="beside transformers' generate", title_justify="left")
    for name in ("model", "precision", "batch", "prefill/s", "ratio", "decode/s", "ratio", "of copy"):
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(
            r.shape,
            r.precision,
            str(r.batch),
            f"{r.prefill_tokens_s:,.0f}",
            f"{r.prefill_ratio:.2f}",
            f"{r.decode_tokens_s:,.1f}",
            f"{r.decode_ratio:.2f}",
            f"{r.share_of_copy:.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    run_cli(main)
