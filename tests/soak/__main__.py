"""Kill training runs, restart them, and see that nothing of it is left in what they compute.

    python -m tests.soak --cycles 200 --seed 0 --json benchmarks/results/soak.json
    python -m tests.soak --seed 0 --chain 17        one run again, with its kills drawn as they were

A cycle is a kill -9 of one rank and the restart after it. Each run goes through three (two where the real launchers
start it) before it may end; then it is compared with one that nobody touched. The moments are drawn from the seed;
where they hit depends on the machine too.
"""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.machine import conditions
from megagpt.processes.local import warm_up
from tests.soak.case import Layout, make_dataset
from tests.soak.chain import Chain, Cycle, Reference, make_chain, make_reference, run_chain
from tests.soak.moment import WINDOWS

PHASES = ("starting", "training", "saving", "ending")
DAMAGE = ("tests.soak.damage", "tests.soak.index_damage")


def main() -> int:
    """Exit code 0 where nothing was found, 1 where something was."""
    arguments = parse()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="megagpt-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    cycles: list[Cycle] = []
    work = Work(folder)
    for done in soak(arguments, work):
        cycles += done
        tell(done, len(cycles), arguments.cycles)
    report: dict[str, Any] = conditions("tests.soak", "cpu") | summary(cycles)
    report["failures"] += work.broken
    report["wall_s"] = round(time.monotonic() - start, 1)
    print(json.dumps({k: v for k, v in report.items() if k not in ("machine", "versions")}, indent=1), flush=True)
    if arguments.chain is None:
        report["damage"] = [damage(module, arguments) for module in DAMAGE]
    if not arguments.folder and not report["failures"]:
        shutil.rmtree(folder)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = bool(report["failures"]) or any(part["code"] for part in report.get("damage", []))
    return 1 if failed or not cycles else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=200, help="kills and restarts")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, the ranks, and how runs are started")
    parser.add_argument("--chain", type=int, help="run this one alone")
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    parser.add_argument("--flips", type=int, default=2000, help="bits to flip, in a checkpoint and in an index")
    parser.add_argument("--cuts", type=int, default=500, help="cuts, likewise")
    parser.add_argument("--folder", help="where runs are kept that show something; default a new one")
    parser.add_argument("--json", help="write the report here")
    return parser.parse_args()


def soak(arguments: argparse.Namespace, work: Work) -> Iterator[list[Cycle]]:
    """The cycles of one run after another, several side by side, until there are enough."""
    if arguments.chain is not None:
        yield work.run(make_chain(arguments.chain, arguments.seed))
        return
    number, n_cycles, running = 0, 0, set()
    with ThreadPoolExecutor(arguments.at_once) as pool:
        while running or n_cycles < arguments.cycles:
            while len(running) < arguments.at_once and n_cycles < arguments.cycles:
                running.add(pool.submit(work.run, make_chain(number, arguments.seed)))
                number += 1
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                n_cycles += len(future.result())
                yield future.result()


class Work:
    """The folder of a soak, and the references made so far: one for each layout. broken: runs of no use."""

    def __init__(self, folder: Path) -> None:
        warm_up("tests.soak.rank")
        self._folder, self._dataset = folder, make_dataset(folder)
        self._references: dict[Layout, Reference] = {}
        self.broken: list[dict[str, Any]] = []

    def run(self, chain: Chain) -> list[Cycle]:
        """Kill and restart one run."""
        try:
            return run_chain(chain, self._reference(chain), self._dataset, self._folder / f"chain-{chain.number:04d}")
        except AssertionError as error:  # 199 others are still worth having
            print(f"  FAILED {error}\n  repeat: {repeat(chain)}", flush=True)
            self.broken.append({"repeat": repeat(chain), "layout": str(chain.layout), "problems": [str(error)[:1000]]})
            return []

    def _reference(self, chain: Chain) -> Reference:
        if chain.layout not in self._references:
            folder = self._folder / f"reference-{chain.layout}-{chain.number}"
            self._references[chain.layout] = make_reference(chain.layout, self._dataset, folder)
        return self._references[chain.layout]


def tell(cycles: list[Cycle], done: int, wanted: int) -> None:
    """One line a cycle, and what is wrong with it."""
    for cycle in cycles:
        chain, hit = cycle.chain, cycle.hit
        at = hit.window if hit.phase == "saving" else f"{hit.phase}, step {hit.step}"
        mode = f"{chain.way}{', async' if chain.async_save else ''}"
        ended = f"exit codes {cycle.codes} in {cycle.ended_s:.1f} s"
        print(f"{done:4d}/{wanted} chain {chain.number} {chain.layout} ({mode}) rank {hit.aim.rank}: {at}; "
              f"{ended}; on from {cycle.resumed_from}", flush=True)  # fmt: skip
        for problem in cycle.problems[:10]:
            print(f"  FAILED {problem}", flush=True)
        if cycle.problems:
            print(f"  repeat: {repeat(cycle.chain)}", flush=True)


def repeat(chain: Chain) -> str:
    """The command that draws the same kills again."""
    return f"python -m tests.soak --seed {chain.seed} --chain {chain.number}"


def summary(cycles: list[Cycle]) -> dict[str, Any]:
    """What was done and found, counted."""

    def count(of: Iterator[Any]) -> dict[str, int]:
        return dict(sorted(collections.Counter(map(str, of)).items()))

    windows = collections.Counter(cycle.hit.window for cycle in cycles)
    phases = collections.Counter(cycle.hit.phase for cycle in cycles)
    return {
        "cycles": len(cycles),
        "runs": len({cycle.chain.number for cycle in cycles}),
        "cycles_by_layout": count(cycle.chain.layout for cycle in cycles),
        "cycles_by_way": count(cycle.chain.way for cycle in cycles),
        "cycles_by_save": count("async" if cycle.chain.async_save else "sync" for cycle in cycles),
        "killed_rank": count(cycle.hit.aim.rank for cycle in cycles),
        "hit_phase": {phase: phases[phase] for phase in PHASES},
        "hit_window": {window: windows[window] for window in WINDOWS},
        "left_on_disk": count(cycle.left for cycle in cycles if cycle.left),
        "resumed_from_step": count(cycle.resumed_from for cycle in cycles),
        "exit_codes": count(code for cycle in cycles for code in cycle.codes or []),
        "survivors_ended_s_max": round(max((cycle.ended_s for cycle in cycles), default=0.0), 1),
        "failures": [
            {"repeat": repeat(cycle.chain), "layout": str(cycle.chain.layout), "problems": cycle.problems[:10]}
            for cycle in cycles
            if cycle.problems
        ],
    }


def damage(module: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Flip bits and cut files by a program of its own; what it counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.json"
        options = ["--flips", arguments.flips, "--cuts", arguments.cuts, "--seed", arguments.seed, "--json", path]
        done = subprocess.run([sys.executable, "-m", module, *map(str, options)], check=False)
        counts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return {"program": module, "code": done.returncode, "counts": counts}


if __name__ == "__main__":
    sys.exit(main())
