"""What the soak trains: a tiny run with everything on that an inexact resume would show, on text made here.

Three dropouts, clipping, a learning rate that changes with every step, validations, checkpoints every third step of
which two are kept; by the program's own command line, so that all of it is the path of a user.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megagpt.data.text.prepare import TokenizerFiles, prepare

STEPS, SAVE_INTERVAL, BATCH = 15, 3, 8
# Seconds until the survivors of a kill must have ended by themselves. Generous: the machine may be busy.
HEARTBEAT_TIMEOUT_S, PROGRESS_TIMEOUT_S = 10.0, 20.0


@dataclass(frozen=True)
class Layout:
    """How a run is spread out, and its precision: what decides its numbers to the last bit."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    precision: str = "fp32"

    @property
    def n_ranks(self) -> int:
        """Processes it needs."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        axes = {"pp": self.pp, "tp": self.tp, "dp": self.dp}
        return "".join(f"{axis}{size}" for axis, size in axes.items() if size > 1) + f"-{self.precision}"


LAYOUTS = tuple(
    Layout(**axes, precision=precision)
    for axes in ({"pp": 2}, {"tp": 2}, {"dp": 2}, {"pp": 2, "tp": 2})
    for precision in ("fp32", "bf16")
)


def make_dataset(folder: Path) -> str:
    """Write and tokenize a small text; the prefix to train on."""
    random = Random(0)
    words = ["".join(random.choices("abcdefghij", k=random.randint(2, 7))) for _ in range(60)]
    source = folder / "text.jsonl"
    texts = (" ".join(random.choices(words, k=random.randint(5, 60))) for _ in range(300))
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepare([str(source)], str(folder / "text"), TokenizerFiles(kind="bytes"), append_eod=True, workers=1)
    return str(folder / "text_text_document")


def command_line(
    layout: Layout, dataset: str, run: Path, *, async_save: bool = False, keep_all: bool = False
) -> list[str]:
    """The arguments of examples/pretrain_gpt.py, the same at the start and at each restart."""
    words = f"""
        --n-layers 2 --d-model 32 --n-heads 4 --seq-len 32 --tp {layout.tp} --pp {layout.pp}
        --precision {layout.precision} --micro-batch-size 2 --global-batch-size {BATCH} --train-steps {STEPS}
        --model.dropout-embedding 0.1 --model.dropout-attention 0.1 --model.dropout-residual 0.1
        --lr 0.01 --warmup-steps 4 --clip 0.5 --eval-interval 6 --eval-steps 1
        --save-interval {SAVE_INTERVAL} --auto-resume
        --faults.heartbeat-timeout-s {HEARTBEAT_TIMEOUT_S} --faults.progress-timeout-s {PROGRESS_TIMEOUT_S}
    """.split()
    words += [] if keep_all else ["--keep-last", "2"]
    words += ["--async-save"] if async_save else []
    return [*words, "--data-path", dataset, "--save", str(run)]
