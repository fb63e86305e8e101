"""Dense against factorised MLPs at equal compute: loss against FLOPs, and the compute multiplier of each kind.

    python -m benchmarks.factorised_study                              some 5 minutes on two cores
    python -m benchmarks.factorised_study --kinds dense monarch:4 --widths 256 512 --budgets 1e15 4e15 --json a.json

For each kind, width and budget a small GPT reads bytes of Python's standard library until the budget is spent: every
run of a budget takes the same FLOPs (the plan's formulas, forward and backward), thus cheaper models read more text.
A kind's curve is the best width at each budget. Its compute multiplier at a budget is the compute that the dense curve
needs for the same loss, over that budget: above 1 the factorised model is the better use of compute. The dense curve
has a budget more, three times the largest, and is read by straight lines in log C, log L; where it does not reach as
far even so, only a bound is given.

A kind is dense, low_rank:N (rank d_model / N), monarch:N (N blocks; as many parameters as low_rank:N) or butterfly.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.console import Console
from rich.table import Table

from benchmarks.machine import conditions, headline
from megagpt.config import ModelConfig
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.files import json_text
from megagpt.inventory.layers import layers
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE

DENSE = "dense"
BATCH, SEQ_LEN = 8, 64
VALIDATION_BATCHES = 16
TEXT_BYTES = 24_000_000
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # Okabe and Ito's


@dataclass(frozen=True)
class Run:
    """A model that was trained until its budget was spent. loss: of held-out bytes, in nats."""

    kind: str
    d_model: int
    lr: float
    budget_flops: float
    parameters: int
    flops_per_token: int
    steps: int
    loss: float
    time_s: float


@dataclass(frozen=True)
class Multiplier:
    """A kind at a budget. bound: "" for a value, "<" or ">" where the dense curve does not reach that loss."""

    kind: str
    budget_flops: float
    loss: float
    value: float
    bound: str


def model_of(kind: str, d_model: int, n_layers: int) -> ModelConfig:
    """A GPT on bytes of this width, its MLPs of this kind."""
    name, _, number = kind.partition(":")
    if (
        name not in ("dense", "low_rank", "monarch", "butterfly")
        or (name in ("low_rank", "monarch")) != number.isdigit()
    ):
        raise UserError(f"--kinds {kind}: wanted dense, low_rank:N, monarch:N or butterfly")
    given: dict[str, Any] = {"mlp": name}
    if name == "low_rank":
        given["mlp_rank"] = d_model // int(number)
    if name == "monarch":
        given["mlp_blocks"] = int(number)
    n_heads = max(1, d_model // 32)
    return ModelConfig(n_layers=n_layers, d_model=d_model, n_heads=n_heads, seq_len=SEQ_LEN, vocab_size=256, **given)


def trained(kind: str, model: ModelConfig, budget_flops: float, lr: float, text: np.ndarray) -> Run:
    """Train with AdamW, warm-up and a cosine to a tenth; the same batches for every kind."""
    listed = layers(model)
    flops_per_token = 3 * sum(layer.flops_per_token for layer in listed)  # a backward pass is two forward ones
    steps = max(1, round(budget_flops / (flops_per_token * BATCH * SEQ_LEN)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpt = GPT(model, SINGLE, seed=1).to(device)
    decayed = [p for p in gpt.parameters() if p.ndim >= 2]
    rest = [p for p in gpt.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    start, warm_up, split = time.perf_counter(), max(1, steps // 20), len(text) * 9 // 10
    for step in range(steps):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warm_up) * cosine
        _loss(gpt, text[:split], step, device).backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    time_s = time.perf_counter() - start
    with torch.no_grad():
        losses = [float(_loss(gpt.eval(), text[split:], number, device)) for number in range(VALIDATION_BATCHES)]
    parameters = sum(layer.params for layer in listed)
    loss = sum(losses) / len(losses)
    return Run(kind, model.d_model, lr, budget_flops, parameters, flops_per_token, steps, loss, time_s)


def _loss(gpt: GPT, text: np.ndarray, number: int, device: torch.device) -> torch.Tensor:
    """Of a batch that is a function of its number."""
    starts = np.random.default_rng(number).integers(0, len(text) - SEQ_LEN - 1, BATCH)
    batch = torch.from_numpy(np.stack([text[s : s + SEQ_LEN + 1] for s in starts]).astype(np.int64)).to(device)
    return gpt(batch[:, :-1].contiguous(), labels_BT=batch[:, 1:].contiguous())


def curves(runs: list[Run]) -> dict[str, list[Run]]:
    """By kind: at each budget the run of the lowest loss, budgets ascending."""
    best: dict[str, dict[float, Run]] = {}
    for run in runs:
        kind = best.setdefault(run.kind, {})
        if run.budget_flops not in kind or run.loss < kind[run.budget_flops].loss:
            kind[run.budget_flops] = run
    return {kind: [found[budget] for budget in sorted(found)] for kind, found in best.items()}


def multipliers(by_kind: dict[str, list[Run]]) -> list[Multiplier]:
    """Of every kind but dense, at every budget."""
    dense = [(run.budget_flops, run.loss) for run in by_kind[DENSE]]
    found = []
    for kind, runs in by_kind.items():
        for run in runs if kind != DENSE else ():
            needed, bound = compute_for(run.loss, dense)
            found.append(Multiplier(kind, run.budget_flops, run.loss, needed / run.budget_flops, bound))
    return found


def compute_for(loss: float, curve: list[tuple[float, float]]) -> tuple[float, str]:
    """The compute at which a curve of (compute, loss) reaches this loss, and "<" or ">" where that is only a bound."""
    if loss > curve[0][1]:
        return curve[0][0], "<"
    for (c_0, l_0), (c_1, l_1) in itertools.pairwise(curve):
        if l_1 <= loss <= l_0:
            share = math.log(l_0 / loss) / math.log(l_0 / l_1) if l_0 > l_1 else 0.0
            return c_0 * (c_1 / c_0) ** share, ""
    return curve[-1][0], ">"


def plot(by_kind: dict[str, list[Run]], runs: list[Run], out: Path) -> None:
    """Every run as a dot, each kind's best ones as a line."""
    figure = Figure(figsize=(7.5, 5), dpi=90, layout="constrained")
    axes = figure.subplots()
    for (kind, best), colour in zip(by_kind.items(), COLOURS, strict=False):
        dots = [run for run in runs if run.kind == kind]
        axes.scatter([r.budget_flops for r in dots], [r.loss for r in dots], s=14, color=colour, alpha=0.35)
        axes.plot([r.budget_flops for r in best], [r.loss for r in best], marker="o", color=colour, label=kind)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("FLOPs of the training")
    axes.set_ylabel("loss of held-out text, nats per byte")
    axes.set_title("Dense and factorised MLPs at equal compute")
    axes.grid(True, which="both", color="0.9", linewidth=0.6)
    axes.legend(frameon=False)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise UserError(f"cannot write {out}: {error}; name another file ending in .png, .svg or .pdf") from None


def standard_library() -> np.ndarray:
    """Bytes of its sources, files in a shuffled order, so that what is held out is like the rest."""
    files = sorted(path for path in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py") if "-packages" not in str(path))
    random.Random(0).shuffle(files)
    text = b"\n".join(path.read_bytes() for path in files)[:TEXT_BYTES]
    return np.frombuffer(text, np.uint8)


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=[DENSE, "low_rank:4", "monarch:4", "butterfly"], metavar="KIND")
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 64], metavar="D", help="of d_model")
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=[1e10, 3e10, 1e11], metavar="FLOPS", help="of a run"
    )
    parser.add_argument(
        "--lrs", nargs="+", type=float, default=[3e-3, 6e-3], help="learning rates; the best one counts"
    )
    parser.add_argument("--n-layers", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, help="draw the curves here")
    args = parser.parse_args()
    if DENSE not in args.kinds:
        raise UserError(f"--kinds {' '.join(args.kinds)}: the multiplier is against dense; name it too")
    return args


def main() -> None:
    args = _parse()
    console, text = Console(width=110, highlight=False), standard_library()
    about = conditions("benchmarks.factorised_study", "cuda" if torch.cuda.is_available() else "cpu")
    console.print(headline(about))
    models = {(kind, width): model_of(kind, width, args.n_layers) for kind in args.kinds for width in args.widths}
    runs, beyond = [], 3 * max(args.budgets)
    for budget in [*sorted(args.budgets), beyond]:
        for (kind, width), model in models.items():
            for lr in args.lrs if kind == DENSE or budget < beyond else ():
                run = trained(kind, model, budget, lr, text)
                runs.append(run)
                console.print(
                    f"{kind:<12} width {width:<5} lr {lr:g} {budget:.1e} FLOPs: {run.steps:>5} steps, "
                    f"loss {run.loss:.4f}, {run.time_s:.0f} s"
                )
    by_kind = curves(runs)
    found = multipliers(by_kind)
    _show(console, by_kind, found)
    if args.json:
        figures = about | {"runs": [asdict(run) for run in runs], "compute_multipliers": [asdict(m) for m in found]}
        args.json.write_text(json_text(figures, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(by_kind, runs, args.plot)


def _show(console: Console, by_kind: dict[str, list[Run]], found: list[Multiplier]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(("kind", "FLOPs", "best width", "parameters", "loss", "compute multiplier")):
        table.add_column(column, justify="right" if number else "left")
    by_point = {(m.kind, m.budget_flops): f"{m.bound}{m.value:.2f}" for m in found}
    for kind, runs in by_kind.items():
        for run in runs:
            figures = (f"{run.budget_flops:.1e}", f"{run.d_model}", f"{run.parameters:,}", f"{run.loss:.4f}")
            table.add_row(kind, *figures, by_point.get((kind, run.budget_flops), ""))
    console.print(table)


if __name__ == "__main__":
    run_cli(main)
