"""Implementations of attention side by side: forward and backward of one layer's, by context, dropout and pattern.

    python -m benchmarks.attention_steps --json benchmarks/results/attention-steps-cpu.json

Each case's implementations take turns, and each one's best time counts; the projections around attention are left out.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import conditions
from megagpt.config import ModelConfig
from megagpt.config.kernels import Kernels
from megagpt.config.pattern import Pattern
from megagpt.errors import ArgumentParser, run_cli
from megagpt.inventory import layers as inventory
from megagpt.inventory.attention import attention_lacks
from megagpt.model.attention import IMPLEMENTATIONS
from megagpt.model.attention.attention import Attention
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import Declared

CASES = (  # tokens of a sequence, dropout, positions, pattern
    (512, 0.1, "none", "dense"),
    (1024, 0.1, "none", "dense"),
    (1024, 0.0, "alibi", "dense"),
    (2048, 0.1, "none", "dense"),
    (2048, 0.0, "none", "window:256"),
)
CHOICES = ("softmax", "blocks", "sdpa")


def main() -> None:
    """Measure, print and write."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--d-model", type=int, default=768, help="in heads of 64 (default: 768)")
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch (default: 2048)")
    parser.add_argument("--turns", type=int, default=7, help="of which the best counts (default: 7)")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    rows = []
    for seq_len, dropout, position, pattern in CASES:
        config = ModelConfig(
            n_layers=1,
            d_model=a.d_model,
            n_heads=a.d_model // 64,
            seq_len=seq_len,
            vocab_size=8,
            position=position,
            attention=(Pattern.parse(pattern),),
            dropout_attention=dropout,
        )
        choices = [choice for choice in CHOICES if attention_lacks(choice, position, dropout) is None]
        modules = {choice: attention(config, choice, a.device) for choice in choices}
        times: dict[str, list[float]] = {choice: [] for choice in choices}
        for _ in range(a.turns):
            for choice, module in modules.items():
                times[choice].append(seconds(module, max(1, a.tokens // seq_len), seq_len, a.device))
        best = {choice: min(some) for choice, some in times.items()}
        about = {"seq_len": seq_len, "dropout": dropout, "position": position, "pattern": pattern}
        rows.append(about | {f"{choice}_ms": round(1e3 * s, 2) for choice, s in best.items()})
        shown = ", ".join(f"{choice} {1e3 * s:.1f} ms ({best['softmax'] / s:.2f} x)" for choice, s in best.items())
        print(f"{seq_len} tokens, dropout {dropout}, {position}, {pattern}: {shown}", flush=True)
    if a.json:
        written = conditions("benchmarks.attention_steps", a.device) | {"rows": rows}
        a.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def attention(config: ModelConfig, choice: str, device: str) -> Attention:
    """One layer's, in training."""
    declared = Declared("attention", inventory.attention(config, 0), seed=1)
    return Attention(config, 0, SINGLE, declared, Kernels.parse(f"auto,attention={choice}")).to(device)


def seconds(module: Attention, batch: int, seq_len: int, device: str) -> float:
    """Of a forward and a backward pass over queries, keys and values."""
    size = (batch, seq_len, len(module.heads), 3, module.d_head)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    qkv: list[Tensor] = [x.transpose(1, 2).detach() for x in torch.randn(size, dtype=dtype, device=device).unbind(3)]
    q, k, v = (x.requires_grad_() for x in qkv)
    ids_B = torch.arange(batch, device=device)
    synchronize(device)
    start = time.perf_counter()
    y = IMPLEMENTATIONS[module.choice].attend(module, q, k, v, ids_B)
    y.backward(torch.ones_like(y))
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for what the GPU was given."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_cli(main)
