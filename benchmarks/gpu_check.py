"""Build, prove, benchmark and train on this machine's GPU, into one JSON: what `make gpu-check` runs.

    python -m benchmarks.gpu_check                            all of it, some minutes
    python -m benchmarks.gpu_check --parts prove,bench        some of it, added to the same JSON
    python -m benchmarks.gpu_check --device cpu --quick       the same code on a CPU, to see that it runs

It installs nothing: torch and numpy do for all but training, which needs PyYAML too. Each op is proven and
measured in a process of its own, since a CUDA error ends all later work of the process that met it.
The exit status is 0 when all that was asked for ran and passed; a goal that was missed is listed, and no failure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import conditions, headline
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.files import json_text

ROOT = Path(__file__).parents[1]
TIME_LIMIT_S = {"build": 500, "prove": 240, "bench": 300, "train": 400}  # of one process
GRACE_S = 10  # to end by itself, once it has answered
FOR_TRAINING = {"yaml": "PyYAML"}  # package by module
# Training runs once for each: with our kernels, and with plain PyTorch (flash attention in both).
KERNEL_CHOICES = ("auto", "reference,softmax=auto")

Result = dict[str, Any]


def main() -> int:
    args = _parse()
    use_device(args.device)
    about = conditions("benchmarks.gpu_check", args.device)
    file = args.json or ROOT / "benchmarks" / "results" / f"gpu-{slug(about['machine'].get('gpu', 'none'))}.json"
    figures = Figures(file, about)
    print(f"{headline(about)}\nfigures: {file}", flush=True)
    for name in args.parts:
        part, expected = PARTS[name]
        print(f"\n[{name}] {expected}", flush=True)
        start = time.perf_counter()
        try:
            result = part(args)
        except Exception as error:  # the parts that follow run all the same, and the exit status tells
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            print(f"  failed: {result['error']}", flush=True)
        figures.write(name, {**result, "command": about["command"], "took_s": round(time.perf_counter() - start, 1)})
        print(f"  {'passed' if result['ok'] else 'FAILED'} in {figures.parts[name]['took_s']} s", flush=True)
    return int(not all(figures.parts[name]["ok"] for name in args.parts))


def use_device(device: str) -> None:
    """Hold this process and those that it starts to a device. Raises UserError where there is no such one."""
    if device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    elif not torch.cuda.is_available():
        raise UserError(
            f"no GPU was found by torch {torch.__version__}; wanted an NVIDIA GPU, its driver, and a torch built with "
            "CUDA (to see this run without one: ARGS='--device cpu --quick')"
        )
    else:  # no other architecture is built: it takes half the time
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))


class Figures:
    """The JSON: parts of other runs stay in it, as long as machine and versions are the same."""

    def __init__(self, file: Path, about: Result) -> None:
        self.file, self.about = file, about
        self.parts: dict[str, Result] = {}
        if file.exists():
            earlier = json.loads(file.read_text())
            if self._identity(earlier) == self._identity(about):
                self.parts = earlier["parts"]
            else:
                print(f"{file} was of another machine or other versions: it begins anew", flush=True)

    def write(self, name: str, result: Result) -> None:
        """Add a part, and write all of them: a later part that is killed takes none with it."""
        self.parts[name] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json_text({**self.about, "parts": self.parts}, indent=1) + "\n")

    @staticmethod
    def _identity(about: Result) -> tuple:
        machine = {k: v for k, v in about["machine"].items() if k != "load_average"}
        return machine, about["versions"]


def build(args: argparse.Namespace) -> Result:
    """Compile csrc/ for this GPU."""
    nvcc = nvcc_version()
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S["build"],
    )  # fmt: skip
    seconds = round(time.perf_counter() - start, 1)
    messages = [line.removeprefix("megagpt: ") for line in run.stderr.splitlines() if line.startswith("megagpt: ")]
    needed = ["megagpt._C"] + (["CUDA kernels"] if args.device == "cuda" else [])
    left_out = [name for name in needed for line in messages if name in line.partition(" not built")[0]]
    ok = run.returncode == 0 and not left_out
    for line in (f"nvcc: {nvcc or 'none'}", *messages):
        print(f"  {line}", flush=True)
    result = {"ok": ok, "build_s": seconds, "nvcc": nvcc, "messages": messages}
    if not ok:
        result["output"] = (run.stdout + run.stderr)[-4000:]
        print(result["output"], flush=True)
    return result


def nvcc_version() -> str | None:
    """Release of the nvcc that torch builds with; None where it builds for the CPU alone."""
    from torch.utils.cpp_extension import CUDA_HOME  # needs setuptools, which only the build does

    nvcc = shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release .*", told)
    return found[0] if found else told


def prove(args: argparse.Namespace) -> Result:
    """Every check of every op, several ops at a time; the branches not taken; dropout masks of CPU and GPU."""
    ops: dict[str, Result] = {}

    def prove_op(op: str) -> None:
        try:
            ops[op] = in_process("prove", "benchmarks.gpu_prove", "prove", op, args.device, args.quick)
        except WorkerError as error:
            ops[op] = {"passed": 0, "failed": [{"check": "all", "message": str(error)}], "branches": []}
        failed = ops[op]["failed"]
        print(f"  {op}: {ops[op]['passed']} passed, {len(failed)} failed", flush=True)
        for failure in failed[:5]:
            print(f"    {failure['check']}: {failure['message'][:300]}", flush=True)

    with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 4))) as pool:
        list(pool.map(prove_op, args.ops))
    wanted = branches_named(args.ops, args.device)
    missed = sorted(wanted - {branch for result in ops.values() for branch in result["branches"]})
    print(f"  branches: {len(wanted) - len(missed)} of {len(wanted)} taken", *missed, sep="\n    ", flush=True)
    masks = in_process("prove", "benchmarks.gpu_prove", "dropout_masks", args.device)
    print(f"  dropout masks of CPU and GPU: {masks}", flush=True)
    ok = not missed and not masks.get("differing") and not any(result["failed"] for result in ops.values())
    return {
        "ok": ok,
        "passed": sum(result["passed"] for result in ops.values()),
        "failed": sum(len(result["failed"]) for result in ops.values()),
        "branches_taken": len(wanted) - len(missed),
        "branches_missed": missed,
        "dropout_masks": masks,
        "ops": dict(sorted(ops.items())),
    }


def branches_named(ops: list[str], device: str) -> set[str]:
    """Each MEGAGPT_BRANCH in the sources of these ops."""
    files = (ROOT / "csrc" / f"{op}.{'cu' if device == 'cuda' else 'cpp'}" for op in ops)
    sources = [file.read_text() for file in files if file.exists()]  # a chain of other ops has none
    return {name for source in sources for name in re.findall(r'MEGAGPT_BRANCH\("([^"]+)"\)', source)}


def bench(args: argparse.Namespace) -> Result:
    """Every op, one after another."""
    ops, errors = [], {}
    for op in args.ops:
        try:
            result = in_process("bench", "benchmarks.gpu_bench", "bench", op, args.device, args.quick)
        except WorkerError as error:
            errors[op] = str(error)
            print(f"  {op} failed: {error}", flush=True)
            continue
        ops.append(result)
        for row in result["rows"]:
            print(f"  {op}: {row['shape']}: {in_brief(row)}", flush=True)
            for name, why in row["failed"].items():
                print(f"    {name} failed: {why}", flush=True)
    goals = [{"op": result["op"], **goal} for result in ops for goal in result.pop("goals")]
    met = sum(goal["met"] for goal in goals)
    print(f"  goals: {met} of {len(goals)} met", flush=True)
    for goal in goals:
        if not goal["met"]:
            print("    missed: {op}: {shape}: {goal}: {got:g}, wanted {wanted:g}".format(**goal), flush=True)
    ours_failed = any("kernel" in row["failed"] for result in ops for row in result["rows"])
    return {"ok": not errors and not ours_failed, "ops": ops, "errors": errors, "goals_met": met, "goals": goals}


def in_brief(row: Result) -> str:
    """Our kernel's shares, and the others' time in units of ours."""
    words = []
    for which in ("forward", "backward"):
        found = row[which]["implementations"]
        if "kernel" in found:
            others = (f"{name} x{s['time_over_ours']:.2f}" for name, s in found.items() if name != "kernel")
            words.append(f"{which} {found['kernel']['share_of_copy']:.0%} of copy, {', '.join(others)}")
    return "; ".join(words) or "nothing of ours ran"


def train(args: argparse.Namespace) -> Result:
    """The preset, once for each choice of kernels."""
    missing = [package for module, package in FOR_TRAINING.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"  skipped: not installed: {', '.join(missing)}", flush=True)
        return {"ok": False, "skipped": "training", "missing": missing}
    runs, errors = [], {}
    for kernels in KERNEL_CHOICES:
        settings = (args.preset, args.device, args.steps, args.batch, args.dropout, kernels)
        try:
            run = in_process("train", "benchmarks.gpu_train", "train", *settings)
        except WorkerError as error:
            errors[kernels] = str(error)
            print(f"  kernels={kernels} failed: {error}", flush=True)
            continue
        runs.append(run)
        utilisation = "not known here" if run["mfu"] is None else f"{run['mfu']:.1%}"
        print(
            f"  kernels={kernels}, by the {run['trained_by']}: {run['tokens_per_s']:,.0f} tokens/s, MFU {utilisation}, "
            f"loss {run['first_loss']:.3f} to {run['last_loss']:.3f}, {run['peak_memory_mib']:,} MiB",
            flush=True,
        )
    # The loss of the first few steps goes up and down; later it must be below the first, and it is always a number.
    learned = all(run["last_loss"] < (run["first_loss"] if args.steps >= 100 else math.inf) for run in runs)
    return {"ok": bool(runs) and not errors and learned, "preset": args.preset, "runs": runs, "errors": errors}


class WorkerError(Exception):
    """A process failed, died or took too long."""


def in_process(part: str, module: str, function: str, *arguments: Any) -> Any:
    """What module.function(*arguments) returns, run in a fresh process. Raises WorkerError."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, module, function, arguments))
    process.start()
    theirs.close()
    try:
        ready = wait([ours, process.sentinel], TIME_LIMIT_S[part])
        if not ready:
            raise WorkerError(f"no answer after {TIME_LIMIT_S[part]} s")
        if not ours.poll():
            raise EOFError
        result, error = ours.recv()
        process.join(GRACE_S)
    except EOFError:
        process.join(GRACE_S)
        raise WorkerError(f"the process died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if error:
        raise WorkerError(error)
    return result


def _work(answer: Connection, module: str, function: str, arguments: tuple) -> None:
    try:
        answer.send((getattr(importlib.import_module(module), function)(*arguments), None))
    except Exception as error:  # to be raised on the other side
        answer.send((None, f"{type(error).__name__}: {error}"))


def slug(name: str) -> str:
    """NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


PARTS: dict[str, tuple[Callable[[argparse.Namespace], Result], str]] = {
    "build": (build, "compiles csrc/: a minute or two"),
    "prove": (prove, "every case of every op against its reference in float64: a minute or two"),
    "bench": (bench, "each kernel beside PyTorch and torch.compile: some seconds a shape"),
    "train": (train, "a preset at its full context length, in bf16: a minute or two"),
}


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    ops = sorted(file.stem for file in (ROOT / "tests" / "ops" / "cases").glob("[a-z]*.py"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    for flag, choices in (("--parts", list(PARTS)), ("--ops", ops)):
        told = f"of {','.join(choices)} (default: all)"
        parser.add_argument(flag, type=_list_of(choices), default=choices, metavar="A,B", help=told)
    parser.add_argument("--quick", action="store_true", help="values only, one shape an op, 20 steps")
    parser.add_argument("--preset", default="gpt2-small", metavar="NAME", help="what is trained (default: gpt2-small)")
    parser.add_argument("--steps", type=int, help="of training (default: 300)")
    parser.add_argument("--batch", type=int, help="sequences a step (default: 32; 2 on a CPU)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the model (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/gpu-NAME.json")
    args = parser.parse_args()
    args.steps = args.steps or (20 if args.quick else 300)
    args.batch = args.batch or (2 if args.device == "cpu" else 32)
    return args


def _list_of(choices: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name} is not known; there are {', '.join(choices)}")
        return text.split(",")

    return parse


if __name__ == "__main__":
    run_cli(main)
