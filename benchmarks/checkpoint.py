"""What a checkpoint costs: how long training stands still for it, and what share of the disk it reaches.

    python -m benchmarks.checkpoint                         27 million parameters, dp=2 with ZeRO 1, five rounds
    python -m benchmarks.checkpoint --d-model 1024 --folder /mnt/scratch --json FILE

Side by side in each round: one process writing and flushing as many bytes as the checkpoint has (what the disk takes),
a save that training waits for, a save beside training, and loading. Hashing is part of both saves, and of loading.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.machine import conditions, headline
from megagpt.checkpoint.folders import find
from megagpt.checkpoint.load import shared_damage_of
from megagpt.checkpoint.save import Saved, Saver
from megagpt.checkpoint.state import State
from megagpt.config import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megagpt.errors import ArgumentParser, run_cli
from megagpt.files import json_text
from megagpt.processes.local import run_ranks
from megagpt.train.step.engine import Engine
from tests.parity.rank import batches_of, start_engine

BLOCK = 16 * 2**20


def main() -> None:
    """Measure, print medians, and write them where --json says."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--n-layers", type=int, default=8)
    parser.add_argument("--dp", type=int, default=2, help="processes, with ZeRO 1 (default 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default the folder for temporary files")
    parser.add_argument("--json", help="write the figures here")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        rounds = run_ranks(_measure, a.dp, _config(a), a.dp, a.rounds, Path(folder), timeout_s=600)[0]
    found = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    report = conditions("benchmarks.checkpoint", "cpu") | {"median": found, "rounds": rounds}
    print(headline(report))
    for name, value in found.items():
        print(f"{name:28}{value:10.3f}")
    if a.json:
        Path(a.json).write_text(json_text(report, indent=1) + "\n")


def _config(a: argparse.Namespace) -> RunConfig:
    return RunConfig(
        model=ModelConfig(n_layers=a.n_layers, d_model=a.d_model, n_heads=8, seq_len=64, vocab_size=4096),
        parallel=ParallelConfig(zero_stage=1),
        train=TrainConfig(micro_batch_size=1, global_batch_size=a.dp, train_steps=10**6),
    )


def _measure(config: RunConfig, dp: int, n_rounds: int, folder: Path) -> list[dict[str, float]]:
    """The rounds, on one of the ranks; the first, which warms up, is left out."""
    engine = start_engine(config, dp)
    sync = Saver(engine.masters, folder / "sync", CheckpointConfig(keep_last=1))
    beside = Saver(engine.masters, folder / "async", CheckpointConfig(keep_last=1, async_save=True))
    return [_round(engine, number, sync, beside, folder) for number in range(n_rounds + 1)][1:]


def _round(engine: Engine, number: int, sync: Saver, beside: Saver, folder: Path) -> dict[str, float]:
    step = 4 * number
    alone_s = _train(engine, step)
    waited = _save(sync, _state(engine, number + 1), lambda: None)
    asynchronous = _save(beside, _state(engine, number + 1), lambda: _train(engine, step + 2))
    path = find(folder / "sync")
    n_bytes = sum(p.stat().st_size for p in path.iterdir())
    dist.barrier()
    disk_s = _timed(lambda: _write_plainly(folder / "plain", n_bytes) if dist.get_rank() == 0 else None)
    verify_s = _timed(lambda: shared_damage_of(path))
    load_s = _timed(lambda: engine.load(path))
    mib = n_bytes / 2**20
    return {
        "checkpoint_mib": mib,
        "step_s": alone_s / 2,
        "disk_mib_per_s": mib / disk_s,
        "save_mib_per_s": mib / waited.write_s,
        "save_share_of_disk": disk_s / waited.write_s,
        "save_stopped_s": waited.stopped_s,
        "async_stopped_s": asynchronous.stopped_s,
        "async_write_s": asynchronous.write_s,
        "stopped_async_of_sync": asynchronous.stopped_s / waited.stopped_s,
        "verify_mib_per_s": mib / verify_s,
        "load_mib_per_s": mib / load_s,
    }


def _save(saver: Saver, state: State, meanwhile: Callable[[], Any]) -> Saved:
    saver.save(state)
    meanwhile()
    saver.wait()
    saved = saver.finished()
    assert saved is not None
    return saved


def _train(engine: Engine, step: int) -> float:
    return _timed(
        lambda: [engine.train_step(s, batches_of(engine.config, s, engine.mesh.data)) for s in (step, step + 1)]
    )


def _timed(work: Callable[[], Any]) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def _state(engine: Engine, step: int) -> State:
    return State(step=step, samples=0, tokens=0, lr=0.0, counters=engine.counters, config=_as_saved(engine), data={})


def _as_saved(engine: Engine) -> dict[str, Any]:
    return {"model": vars(engine.config.model), "train": vars(engine.config.train)}


def _write_plainly(path: Path, n_bytes: int) -> None:
    """What the disk takes: random bytes in large blocks, flushed."""
    block = os.urandom(BLOCK)
    with path.open("wb") as file:
        for start in range(0, n_bytes, BLOCK):
            file.write(block[: n_bytes - start])
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


if __name__ == "__main__":
    run_cli(main)
