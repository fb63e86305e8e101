"""Every op of tests/ops/cases beside plain PyTorch, torch.compile and other packages, in units of a copy's bandwidth.

    python -m benchmarks.kernels                        every op on this machine's device
    python -m benchmarks.kernels softmax                one of them: seconds, once torch.compile has its cache
    python -m benchmarks.kernels --json FILE --plot FILE.png

benchmarks/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import conditions, headline
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.files import json_text
from megagpt.ops.library import MISSING_KERNELS
from tests.ops.case import Arguments, Draw, Shape, Spec, all_specs
from tests.ops.proof import differentiable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "backward")
OURS = "kernel"
WARM_UP_CALLS = 3
MIN_ROUNDS, MAX_ROUNDS = 10, 1000
COPY_SECONDS = 0.3  # long enough for a GPU's clocks to rise
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # larger than any cache
# Writing this much empties a GPU's cache, and takes it long enough that what follows is queued before it begins:
# only the GPU's own time counts. What then waits in the cache to be written stands for what the call leaves there.
FLUSH_BYTES = 1 << 30

Implementation = Callable[..., Any]
Row = dict[str, Any]


def main() -> int:
    args = _parse()
    specs = choose(args.ops)
    if MISSING_KERNELS:
        raise UserError(f"there are no kernels to measure: {MISSING_KERNELS}")
    # Not where only figures are wanted: benchmarks/gpu_check.py measures on machines that have torch and no more.
    from benchmarks.kernels_shown import Screen, plot

    about = conditions("benchmarks.kernels", args.device)
    screen = Screen(headline(about))
    dtypes = tuple(DTYPES) if args.device == "cpu" or args.all_dtypes else ("bf16",)
    clock = Clock(args.device)
    measured = []
    for spec in specs:
        with screen.busy(spec.op):
            measured.append(measure_op(spec, clock, dtypes, args.seconds, args.first))
        screen.show(measured[-1])
    screen.end(measured)
    figures = {**about, "device": args.device, "seconds": args.seconds, "ops": [m.as_json() for m in measured]}
    if args.json:
        args.json.write_text(json_text(figures, indent=1) + "\n")
    if args.plot:
        plot(figures, args.plot)
    return int(any(OURS in row["failed"] for m in measured for row in m.rows))


def choose(names: Sequence[str]) -> list[Spec]:
    """The ops of these names, or all. Raises UserError for one that is not there."""
    specs = {spec.op: spec for spec in all_specs()}
    for name in names:
        if name not in specs:
            raise UserError(f"no op is called {name}; there are {', '.join(specs)}")
    return [specs[name] for name in names or specs]


@dataclass
class Measured:
    """One op: a row per shape and dtype, the copies made before and after, and whose package is not installed."""

    op: str
    rows: list[Row]
    copy_gb_per_s: dict[str, float]
    not_installed: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return vars(self)


class Clock:
    """Times a call on a device."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def time(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """What it returns, and the seconds it took; on a GPU from a flushed cache."""
        if self.device == "cpu":
            start = time.perf_counter()
            result = work()
            return result, time.perf_counter() - start
        self.flushed.zero_()
        self.start.record()
        result = work()
        self.end.record()
        self.end.synchronize()
        return result, self.start.elapsed_time(self.end) / 1e3

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy larger than the caches: the median."""
        source = torch.ones(COPY_BYTES[self.device], dtype=torch.int8, device=self.device)
        target = torch.ones_like(source)
        times_s = [self.time(lambda: target.copy_(source))[1] for _ in rounds(COPY_SECONDS)]
        return 2 * source.numel() / statistics.median(times_s[WARM_UP_CALLS:])


def measure_op(spec: Spec, clock: Clock, dtypes: Sequence[str], seconds: float, first: bool = False) -> Measured:
    """Every shape of an op that belongs on the clock's device (or only the first), in every dtype."""
    before = clock.copy_bandwidth()
    shapes = [shape for shape in spec.shapes if clock.device in shape.devices][: 1 if first else None]
    rows, missing = [], {}
    for shape in shapes:
        for dtype in dtypes:
            implementations, missing = implementations_of(spec, clock.device)
            rows.append(measure_shape(shape, dtype, implementations, clock, seconds))
    after = clock.copy_bandwidth()
    for row in rows:
        _add_shares(row, (before + after) / 2)
    return Measured(spec.op, rows, {"before": before / 1e9, "after": after / 1e9}, missing)


def implementations_of(spec: Spec, device: str) -> tuple[dict[str, Implementation], dict[str, str]]:
    """What to time, by name, ours first; and why other packages are left out."""

    def kernel(**arguments):
        return spec.call(**arguments, kernels=device)

    def eager(**arguments):
        return spec.eager(**arguments) if spec.eager else spec.call(**arguments, kernels="reference")

    torch.compiler.reset()  # each shape and dtype compiled for itself, as a training run would
    found: dict[str, Implementation] = {OURS: kernel, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    missing = {}
    for package, load in spec.peers.items():
        try:
            found[package] = load()
        except (ImportError, OSError, RuntimeError) as error:  # some look for a GPU while they are imported
            missing[package] = first_line(error)
    return found, missing


def measure_shape(
    shape: Shape, dtype: str, implementations: dict[str, Implementation], clock: Clock, seconds: float
) -> Row:
    """One row. The implementations take turns until `seconds` are over, so that what disturbs one disturbs all."""
    arguments = shape.make(Draw(DTYPES[dtype], clock.device))
    row: Row = {
        "shape": shape.name,
        "dtype": dtype,
        "input_bytes": max(v.nbytes for v in arguments.values() if isinstance(v, Tensor)),
        "failed": {},
        "forward": {"bytes": shape.forward_bytes(arguments), "implementations": {}},
        "backward": {"bytes": shape.backward_bytes(arguments), "implementations": {}},
    }
    times_s: dict[str, list[tuple[float, ...]]] = {}
    for name, function in implementations.items():
        try:
            for _ in range(WARM_UP_CALLS):
                time_once(function, arguments, clock)
            times_s[name] = []
        except Exception as error:  # one that fails is named in the table, and the others are measured
            row["failed"][name] = first_line(error)
    for turn in rounds(seconds):
        for name in times_s if turn % 2 == 0 else reversed(times_s):
            times_s[name].append(time_once(implementations[name], arguments, clock))
    for name, taken in times_s.items():
        for which, series in zip(PASSES, zip(*taken, strict=True), strict=False):  # no gradient: no backward
            row[which]["implementations"][name] = _summary(series)
    for which in PASSES:
        _add_ratios(row[which]["implementations"])
    return row


def time_once(function: Implementation, arguments: Arguments, clock: Clock) -> tuple[float, ...]:
    """Seconds of the forward and, if there is one, of the backward pass. Copies go in: some ops overwrite them."""
    given = {k: v.clone() if differentiable(v) else v for k, v in arguments.items()}
    result, forward_s = clock.time(lambda: function(**given))
    outputs = [r for r in ((result,) if isinstance(result, Tensor) else result) if r.requires_grad]
    if not outputs:
        return (forward_s,)
    inputs = [v for v in arguments.values() if differentiable(v)]
    weights = [torch.ones_like(output) for output in outputs]
    _, backward_s = clock.time(lambda: torch.autograd.grad(outputs, inputs, weights, allow_unused=True))
    return forward_s, backward_s


def rounds(seconds: float) -> Iterator[int]:
    """0, 1, … until the time is over: at least MIN_ROUNDS of them, at most MAX_ROUNDS."""
    end = time.perf_counter() + seconds
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() > end:
            return
        yield turn


def _summary(times_s: Sequence[float]) -> dict[str, Any]:
    return {"median_s": statistics.median(times_s), "min_s": min(times_s), "rounds": len(times_s), "times_s": times_s}


def _add_ratios(summaries: dict[str, dict[str, Any]]) -> None:
    """To each of the others: its time in units of ours, round by round, the median. Then the single times may go."""
    ours = summaries.get(OURS)
    for name, summary in summaries.items():
        if ours and name != OURS:
            ratios = [theirs / mine for theirs, mine in zip(summary["times_s"], ours["times_s"], strict=True)]
            summary["time_over_ours"] = statistics.median(ratios)
    for summary in summaries.values():
        del summary["times_s"]


def _add_shares(row: Row, copy_bandwidth: float) -> None:
    for which in PASSES:
        for summary in row[which]["implementations"].values():
            bandwidth = row[which]["bytes"] / summary["median_s"]
            summary["gb_per_s"] = bandwidth / 1e9
            summary["share_of_copy"] = bandwidth / copy_bandwidth


def first_line(error: BaseException) -> str:
    """An error in one line of at most 200 characters."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="files of tests/ops/cases (default: all)")
    devices = ("cpu", "cuda")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=devices, default=default, help="(default: cuda where there is a GPU)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one shape and dtype, all together (default: 1)")
    parser.add_argument("--first", action="store_true", help="only the first shape of each op")
    parser.add_argument("--all-dtypes", action="store_true", help="fp32 on a GPU too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the shares of copy bandwidth (.png, .svg)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu")
    return args


if __name__ == "__main__":
    run_cli(main)
