"""Training beside a plain-PyTorch GPT-2 of transformers doing the same step in the same run, and beside itself without
its kernels; memory beside the plan.

    python benchmarks/train.py                                    every row, some minutes on 2 cores
    python benchmarks/train.py --shapes tiny --layouts one tp2    some of them
    python benchmarks/train.py --json benchmarks/results/train-here.json

benchmarks/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import os

# Read while what follows is imported, here and on the ranks.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler, which counts the memory, speaks at every start
os.environ["PYTHONWARNINGS"] = "ignore"  # of torch about DeepSpeed

import argparse
import dataclasses
import importlib.metadata
import itertools
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megagpt.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megagpt.data.loader import MicroBatch, micro_batches
from megagpt.errors import ArgumentParser, run_cli
from megagpt.files import json_text
from megagpt.hf import hf_config, lazy_to_hf
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.mesh import build_mesh
from megagpt.parallel.parameter import part_of
from megagpt.plan.plan import Plan, make_plan
from megagpt.processes.local import run_ranks, warm_up
from megagpt.train.step.engine import Engine

PEERS = {"fp32": ("fp32",), "bf16": ("autocast", "bf16 weights")}  # by our precision
KERNELS_OFF = "kernels off"  # our own engine on plain PyTorch ops
PEER_MODULE = "transformers.models.gpt2.modeling_gpt2"
WARM_UP_STEPS = 1
N_CORES = os.cpu_count() or 1
TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Shape:
    """A model and its batch, in sequences."""

    model: ModelConfig
    micro_batch_size: int
    global_batch_size: int


@dataclass(frozen=True)
class Layout:
    """How the processes are laid out."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def n_processes(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def n_threads(self) -> int:
        """Of one process: the cores are shared out."""
        return max(1, N_CORES // self.n_processes)

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={n}" for name, n in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp)) if n > 1)
        return sizes or "one process"


SHAPES = {
    # The default run, with the vocabulary of its corpus.
    "tiny": Shape(ModelConfig(vocab_size=4096), micro_batch_size=2, global_batch_size=8),
    # GPT-2 small with 2 of its 12 blocks and a quarter of its context: matrix products and the loss dominate.
    "gpt2": Shape(
        ModelConfig(n_layers=2, d_model=768, n_heads=12, seq_len=256, vocab_size=50257),
        micro_batch_size=1,
        global_batch_size=2,
    ),
}
SMOKE = "smoke"  # to see that it runs
SHAPES[SMOKE] = Shape(ModelConfig(n_layers=2, d_model=16, n_heads=2, seq_len=8, vocab_size=64), 1, 4)
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "dp2": Layout(dp=2),
    "tp2pp2": Layout(tp=2, pp=2),
}


def main() -> None:
    args = _parse()
    console = Console(width=120)
    warm_up(PEER_MODULE)
    tables = []
    for shape, precision, dropout in itertools.product(args.shapes, args.precisions, args.dropouts):
        rows = []
        for layout in _layouts(args, precision, dropout):
            with console.status(f"{shape}, {precision}, dropout {dropout:g}: {layout}"):
                rows.append(measure(run_config(SHAPES[shape], layout, precision, dropout), layout, args.rounds))
        title = f"{shape}, {precision}, dropout {dropout:g}, {rows[0]['tokens_a_step']} tokens a step"
        console.print(table(title, rows))
        tables += [{"shape": shape, "precision": precision, "dropout": dropout, **row} for row in rows]
    if args.json:
        args.json.write_text(json_text({**conditions(args.rounds), "rows": tables}, indent=1) + "\n")


def run_config(shape: Shape, layout: Layout, precision: str, dropout: float) -> RunConfig:
    """The run that is measured. Its learning rate is constant: the peer needs no schedule."""
    model = dataclasses.replace(
        shape.model, dropout_embedding=dropout, dropout_attention=dropout, dropout_residual=dropout
    )
    return RunConfig(
        model=model,
        parallel=ParallelConfig(tp=layout.tp, pp=layout.pp),
        optim=OptimConfig(lr=1e-4, warmup_steps=0, min_lr_fraction=1.0),
        train=TrainConfig(
            micro_batch_size=shape.micro_batch_size,
            global_batch_size=shape.global_batch_size,
            precision=precision,  # type: ignore[arg-type]
        ),
    )


def measure(config: RunConfig, layout: Layout, rounds: int) -> dict[str, Any]:
    """One row: our speed beside each peer's, and the peak memory of each rank beside the plan's."""
    n = layout.n_processes
    plan = make_plan(config, n)

    def on_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
        return run_ranks(function, n, config, plan, *args, n_threads=layout.n_threads, timeout_s=TIMEOUT_S)

    race = on_ranks(run_race, rounds)[0]
    peers = (KERNELS_OFF, *PEERS[config.train.precision])
    peaks = {"ours": on_ranks(peak_bytes, "ours")}
    if n == 1:
        peaks |= {peer: on_ranks(peak_bytes, peer) for peer in peers}
    return {
        "layout": str(layout),
        "processes": n,
        "stages": plan.pp,
        "zero_stage": plan.zero_stage,
        "threads_a_process": layout.n_threads,
        "tokens_a_step": plan.batch_tokens,
        "ours": _speed(race["ours"], plan),
        "peers": {
            peer: {
                **_speed(race[peer], plan),
                "ours_over_peer": _ratio(race[peer], race["ours"]),
                "loss_difference": max(abs(a.loss - b.loss) for a, b in zip(race[peer], race["ours"], strict=True)),
                "peak_mib": _mib(peaks[peer][0]) if peer in peaks else None,
            }
            for peer in peers
        },
        "peak_mib": [_mib(peak) for peak in peaks["ours"]],
        "plan_mib": [_mib(stage.memory.total) for stage in plan.stages for _ in range(n // plan.pp)],
    }


# What runs on the ranks.


@dataclass(frozen=True)
class Step:
    """What one step took, and its loss."""

    time_s: float
    loss: float


class Contestant(Protocol):
    """Trains step after step and says the loss."""

    def step(self, step: int) -> float: ...


def run_race(config: RunConfig, plan: Plan, rounds: int) -> dict[str, list[Step]]:
    """Every step, warm-up included, of ours and, on rank 0, of each peer. They alternate, and who begins does too."""
    contestants: dict[str, Contestant] = {name: build(config, plan, name) for name in ("ours", KERNELS_OFF)}
    if dist.get_rank() == 0:
        contestants |= {peer: build(config, plan, peer) for peer in PEERS[config.train.precision]}
    steps: dict[str, list[Step]] = {name: [] for name in contestants}
    for step in range(WARM_UP_STEPS + rounds):
        names = list(contestants) if step % 2 == 0 else list(reversed(contestants))
        for name in names:
            steps[name].append(_timed(contestants[name], step))
    return steps


def _timed(contestant: Contestant, step: int) -> Step:
    """Ours begins and ends on all ranks together; a peer has all cores, as the other ranks wait."""
    n_threads = torch.get_num_threads()
    if isinstance(contestant, Ours):
        dist.barrier()
    else:
        torch.set_num_threads(N_CORES)
    start = time.perf_counter()
    loss = contestant.step(step)
    if isinstance(contestant, Ours):
        dist.barrier()
    time_s = time.perf_counter() - start
    torch.set_num_threads(n_threads)
    return Step(time_s, loss)


def peak_bytes(config: RunConfig, plan: Plan, contestant: str) -> int:
    """Most bytes that this process's tensors held at one time while a contestant was built and trained 2 steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trained = build(config, plan, contestant)
        for step in range(2):
            trained.step(step)
    events: Any = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]  # in order of time
    sizes = (event.nbytes() for event in events if event.name() == "[memory]")  # negative: given back
    return max(itertools.accumulate(sizes))


def build(config: RunConfig, plan: Plan, name: str) -> Contestant:
    """A contestant by its name: ours, ours without kernels, or a peer."""
    if name == KERNELS_OFF:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, kernels="reference"))
    return Ours(config, plan) if name in ("ours", KERNELS_OFF) else Peer(config, name)


class Ours:
    """This project's engine."""

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        self.config = config
        self.mesh = build_mesh("cpu", pp=plan.pp, dp=plan.dp, tp=plan.tp)
        self.engine = Engine(config, plan, self.mesh)

    def step(self, step: int) -> float:
        return self.engine.train_step(step, _batches(self.config, step, self.mesh.data)).loss


class Peer:
    """GPT-2 of transformers, trained by a loop as most are, from the weights that ours starts from.

    how: fp32; autocast (fp32 weights, matrix products in bf16); bf16 weights (and fp32 copies that AdamW steps on,
    with gradients added up in fp32, which is what ours does in bf16).
    """

    def __init__(self, config: RunConfig, how: str) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel  # only rank 0 of a race needs it, and it loads slowly

        self.config, self.how = config, how
        theirs = GPT2Config(**hf_config(config.model), attn_implementation="sdpa")  # type: ignore[call-arg]
        self.model: Any = GPT2LMHeadModel(theirs)
        self.model.loss_type = "ForCausalLM"  # it would guess this, and warn
        first = lazy_to_hf(_first_weights(config).__getitem__, config.model)
        self.model.load_state_dict({name: tensor.get() for name, tensor in first.items()}, strict=False)
        self.model.train()
        if how == "bf16 weights":
            self.masters = [p.detach().clone().requires_grad_() for p in self.model.parameters()]
            self.model.to(torch.bfloat16)
        else:
            self.masters = list(self.model.parameters())
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.masters if p.ndim >= 2], "weight_decay": optim.weight_decay},
                {"params": [p for p in self.masters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )

    def step(self, step: int) -> float:
        batches = list(_batches(self.config, step))
        total = torch.zeros(())
        for batch in batches:
            loss = self._loss(batch) / len(batches)
            loss.backward()
            total += loss.detach()
            if self.how == "bf16 weights":
                self._move_gradients()
        torch.nn.utils.clip_grad_norm_(self.masters, self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.how == "bf16 weights":
            torch._foreach_copy_([p.data for p in self.model.parameters()], [m.data for m in self.masters])
        return float(total)

    def _loss(self, batch: MicroBatch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "autocast"):
            # shift_labels: the labels are shifted already, and every token has one
            labels = batch.labels_BT
            return self.model(batch.tokens_BT, labels=labels, shift_labels=labels, use_cache=False).loss

    def _move_gradients(self) -> None:
        """Add the bf16 gradients of a micro-batch to the fp32 ones."""
        for parameter, master in zip(self.model.parameters(), self.masters, strict=True):
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None


def _first_weights(config: RunConfig) -> dict[str, Tensor]:
    """Logical tensors by name: initial weights follow from the seed, whatever the layout."""
    model = GPT(config.model, SINGLE, config.train.seed)
    return {name: part_of(p).unpadded(p.data) for name, p in model.named_parameters()}


class _RandomTokens:
    """Samples of noise: what they say does not change the time."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, i: int) -> np.ndarray:
        return np.random.default_rng(i).integers(0, self.model.vocab, self.model.seq_len + 1)


def _batches(config: RunConfig, step: int, data: Axis = SINGLE):
    batch, seq_len = config.train.global_batch_size, config.model.seq_len
    positions = range(step * batch, (step + 1) * batch)
    return micro_batches(_RandomTokens(config.model), config, positions, seq_len, dp_rank=data.rank, dp_size=data.size)


# From figures to what is read.


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """One shape, precision and dropout; a line for each layout and peer."""
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for heading in ("tokens/s", "peer", "tokens/s", "ours / peer", "losses", "peak MiB", "plan", "peer"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        ours = (row["layout"], f"{row['ours']['tokens_per_s']:,.0f}")
        memory = (_by_stage(row["peak_mib"], row["stages"]), _by_stage(row["plan_mib"], row["stages"]))
        for name, peer in row["peers"].items():
            ratio = "{median:.2f} ({low:.2f}-{high:.2f})".format(**peer["ours_over_peer"])
            apart = f"{peer['loss_difference']:.0e}"
            its_peak = f"{peer['peak_mib']:,.0f}" if peer["peak_mib"] else ""
            shown.add_row(*ours, name, f"{peer['tokens_per_s']:,.0f}", ratio, apart, *memory, its_peak)
            ours, memory = ("", ""), ("", "")
    return shown


def conditions(rounds: int) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    packages = ("torch", "deepspeed", "transformers", "numpy")
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": {
            "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
            "cores": N_CORES,
            "load_average": os.getloadavg(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "rounds": rounds,
    }


def _speed(steps: list[Step], plan: Plan) -> dict[str, Any]:
    times_s = [step.time_s for step in steps[WARM_UP_STEPS:]]
    return {
        "tokens_per_s": plan.batch_tokens / statistics.median(times_s),
        "step_times_s": [round(t, 4) for t in times_s],
    }


def _ratio(peer: list[Step], ours: list[Step]) -> dict[str, float]:
    """Our speed in units of the peer's, round by round: the median, and the quartiles around it."""
    ratios = [p.time_s / o.time_s for p, o in zip(peer, ours, strict=True)][WARM_UP_STEPS:]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def _by_stage(mib: list[float], n_stages: int) -> str:
    """The largest rank of each pipeline stage; ranks of a stage follow each other."""
    size = len(mib) // n_stages
    return " ".join(f"{max(mib[i : i + size]):,.0f}" for i in range(0, len(mib), size))


def _mib(n_bytes: int) -> float:
    return round(n_bytes / 2**20, 1)


def _layouts(args: argparse.Namespace, precision: str, dropout: float) -> list[Layout]:
    """What the flags ask for: several processes are measured in fp32 without dropout, if not --all."""
    several = args.all or (precision == args.precisions[0] and dropout == args.dropouts[0])
    return [LAYOUTS[name] for name in args.layouts if several or LAYOUTS[name].n_processes == 1]


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    for flag, choices, default, text in (
        ("--shapes", SHAPES, [name for name in SHAPES if name != SMOKE], "models"),
        ("--precisions", PEERS, PEERS, "number formats"),
        ("--layouts", LAYOUTS, LAYOUTS, "layouts"),
    ):
        told = f"{text}, of {', '.join(choices)} (default: {' '.join(default)})"
        parser.add_argument(flag, nargs="+", choices=choices, default=list(default), metavar="NAME", help=told)
    parser.add_argument(
        "--dropouts", nargs="+", type=float, default=[0.0, 0.1], metavar="P", help="dropout (default: 0 0.1)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each side (default: 5)")
    parser.add_argument(
        "--all", action="store_true", help="several processes with every precision and dropout, not only the first"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure to this file")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
