"""Losses of a fixed set of short runs, as hexadecimal floats: what must not move by a bit when code is only rearranged.

python -m benchmarks.golden --record     # writes benchmarks/results/golden-cpu.json
python -m benchmarks.golden              # runs them again and compares; exit code 1 where a bit differs

Bits are those of one kind of machine and one set of versions, which the file names: elsewhere, record first, change
then. What a layout may change (round-off) is tools/parity.py's business.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import conditions
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.files import json_text

RESULTS = Path(__file__).parent / "results" / "golden-cpu.json"
REPOSITORY = Path(__file__).parents[1]

SMALL = "--n-layers 4 --d-model 64 --n-heads 4 --seq-len 64 --global-batch-size 8 --micro-batch-size 2 --train-steps 12"
DROPOUT = "--model.dropout-attention 0.1 --model.dropout-residual 0.1 --model.dropout-embedding 0.1"
MAKE_TRAIN = "make train"
RUNS = {  # name -> (processes, flags after SMALL)
    "gpt2 one process, dropout": (1, DROPOUT),
    "gpt2 tp 2 pp 2, dropout": (4, f"--tp 2 --pp 2 {DROPOUT}"),
    "gpt2 tp 2 dp 2, ZeRO 2, bf16": (4, "--tp 2 --zero-stage 2 --precision bf16"),
    "gpt2 dp 4, ZeRO 3, recompute": (4, "--zero-stage 3 --recompute"),
    "llama tp 2 pp 2": (4, "--preset llama-7b --model.d-ff 176 --vocab-size 4096 --tp 2 --pp 2"),
    "palm tp 4": (
        4,
        "--preset palm-8b --model.d-ff 256 --model.d-head 16 --vocab-size 4096 --train.batch-steps= --tp 4",
    ),
    "gpt1 pp 2 dp 2": (4, "--preset gpt1 --vocab-size 4096 --model.d-ff 256 --pp 2"),
    "alibi tp 2 dp 2, muon": (4, "--preset gpt-580m-alibi --vocab-size 4096 --model.d-ff 256 --tp 2 --optimizer muon"),
    "t5, bigbird, monarch tp 2 pp 2": (
        4,
        "--model.position t5 --model.attention dense bigbird:8:2:1:1 --model.mlp monarch --model.mlp-blocks 4 "
        "--n-kv-heads 2 --model.activation geglu --tp 2 --pp 2 --optimizer adafactor",
    ),
    "transformer_xl, butterfly tp 2, lion, ema": (
        2,
        "--model.position transformer_xl --model.mlp butterfly --tp 2 --optimizer lion --optim.ema-decay 0.9 "
        "--model.no-tied-embeddings --model.bias-head",
    ),
}  # fmt: skip


def main() -> int:
    """Run, then record or compare."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.name} anew")
    parser.add_argument("--only", default="", help=f'runs whose name has this in it; "{MAKE_TRAIN}": its 500 steps')
    options = parser.parse_args()
    chosen = {name: run for name, run in RUNS.items() if options.only in name}
    if options.only == MAKE_TRAIN:  # minutes, so that it runs only where it is named
        chosen = {MAKE_TRAIN: (4, "--tp 2 --pp 2")}
    if not chosen:
        raise UserError(f"--only {options.only!r} leaves no run; wanted part of one of: {', '.join(RUNS)}")
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))["losses"] if RESULTS.exists() else {}
    found, differing = {}, []
    for name, (n_processes, flags) in chosen.items():
        found[name] = losses_of(n_processes, (flags if name == MAKE_TRAIN else f"{SMALL} {flags}").split())
        same = options.record or found[name] == recorded[name]
        differing += [] if same else [name]
        print(f"{name:<45}{float.fromhex(found[name][-1]):10.6f}  {'ok' if same else 'DIFFERS'}", flush=True)
    if options.record:
        RESULTS.write_text(
            json_text({**conditions("benchmarks.golden", "cpu"), "losses": recorded | found}, indent=1) + "\n",
            encoding="utf-8",
        )
    return 1 if differing else 0


def losses_of(n_processes: int, flags: list[str]) -> list[str]:
    """The training losses and the last validation loss of a run of the program as users start it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
        command += ["examples/pretrain_gpt.py", "--save", folder, *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "validation_loss")
    return [float(line[key]).hex() for line in lines for key in keys if line.get(key) is not None]


if __name__ == "__main__":
    run_cli(main)
