"""One attention layer, forward and backward, by pattern, position, heads of keys, and implementation; times in turn.

    python -m benchmarks.attention                             on this machine's CPU, at GPT-2 small's width
    python -m benchmarks.attention --device cuda --seq-len 4096 --json FILE

Ratios are medians over rounds of each row's time to that of the first row, plain causal attention by torch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import conditions, headline
from megagpt.config import ModelConfig
from megagpt.config.kernels import Kernels
from megagpt.errors import ArgumentParser, run_cli
from megagpt.files import json_text
from megagpt.inventory.layers import attention
from megagpt.model.attention.attention import Attention
from megagpt.model.stream import Stream
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import Declared

BASE = ModelConfig(n_layers=1, d_model=768, n_heads=12, vocab_size=1, position="none")


def rows(seq_len: int, device: str) -> dict[str, tuple[ModelConfig, str]]:
    """By name: the layer, and --kernels. FlexAttention where it trains."""
    base = replace(BASE, seq_len=seq_len)
    patterns = {
        "dense": base,
        f"window:{seq_len // 8}": replace(base, attention=(f"window:{seq_len // 8}",)),
        f"strided:{seq_len // 16}": replace(base, attention=(f"strided:{seq_len // 16}",)),
        f"bigbird:{seq_len // 32}:3:2:3": replace(base, attention=(f"bigbird:{seq_len // 32}:3:2:3",)),
    }
    ways = ("sdpa", "softmax", "flex") if device == "cuda" else ("sdpa", "softmax")
    found = {f"{name}, {way}": (config, f"auto,attention={way}") for name, config in patterns.items() for way in ways}
    for n_kv_heads in (4, 1):
        found[f"dense, {n_kv_heads} key heads"] = (replace(base, n_kv_heads=n_kv_heads), "auto")
    for position in ("rotary", "alibi", "t5", "transformer_xl"):
        found[position] = (replace(base, position=position), "auto")
    return found


def main() -> None:
    args = _parse()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    about = conditions("benchmarks.attention", args.device)
    steps = {name: step(*row, args, dtype) for name, row in rows(args.seq_len, args.device).items()}
    times_s: dict[str, list[float]] = {name: [] for name in steps}
    for one in steps.values():  # compiles what is compiled
        one()
    for _ in range(args.rounds):
        for name, one in steps.items():
            times_s[name].append(one())
    first = next(iter(times_s.values()))
    table = Table("layer", "ms", "time / first", title=headline(about))
    measured = []
    for name, own in times_s.items():
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        measured.append({"layer": name, "time_s": statistics.median(own), "ratio": ratio})
        table.add_row(name, f"{1e3 * statistics.median(own):.1f}", f"{ratio:.2f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json_text({**about, "rounds": args.rounds, "rows": measured}, indent=1) + "\n")


def step(config: ModelConfig, kernels: str, args: Any, dtype: torch.dtype) -> Callable[[], float]:
    """A function that does one forward and backward pass and returns its seconds."""
    declared = Declared("attention", attention(config, 0))
    layer = Attention(config, 0, SINGLE, declared, Kernels.parse(kernels)).to(args.device, dtype)
    shape = (args.batch_size, args.seq_len, config.d_model)
    x_BTD, dy_BTD = (torch.randn(shape, device=args.device, dtype=dtype) for _ in range(2))
    ids_B = torch.arange(args.batch_size, device=args.device)
    x_BTD.requires_grad_()

    def timed() -> float:
        layer.zero_grad()
        x_BTD.grad = None
        start = time.perf_counter()
        layer(Stream(x_BTD, ids_B)).backward(dy_BTD)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return timed


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bf16", action="store_true", help="16 bits; default fp32")
    parser.add_argument("--json", type=Path, help="write the figures here, with the machine's")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
