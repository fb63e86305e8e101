"""What one forked rank of the soak does: the real program, with a record of every sample that it reads.

torch and DeepSpeed are imported by the fork server, not by who names `rank_main` to it: that would cost seconds.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import traceback
from pathlib import Path
from typing import Any

from megagpt.launch import pretrain


def rank_main(rank: int, n_ranks: int, port: int, argv: list[str], notes: str, plant: str | None) -> None:
    """Run the program as rank `rank`; ends the process with the program's exit code.

    notes: what files of this rank begin with; `.out` gets what it prints, `.reads` the samples. plant: a defect, to
    show that it would be found.
    """
    for number, name in ((1, ".out"), (2, ".out")):
        os.dup2(os.open(notes + name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_ranks), LOCAL_SIZE=str(n_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    importlib.import_module("torch").set_num_threads(1)
    gc.freeze()  # as in parallel/local.py
    record_reads(Path(notes + ".reads"))
    try:
        if plant is not None:
            importlib.import_module("tests.soak.plants").PLANTS[plant]()
        pretrain(argv)  # ends the process
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def record_reads(path: Path) -> None:
    """From here on this process writes down each training sample that it reads: its position, a hash of its tokens."""
    run = importlib.import_module("megagpt.run")
    build_splits = run.build_splits
    file = path.open("a", buffering=1, encoding="ascii")

    def recorded(*args: Any, **kwargs: Any) -> Any:
        train_samples, *others = build_splits(*args, **kwargs)
        return (Recorded(train_samples, file), *others)

    run.build_splits = recorded


class Recorded:
    """Samples that write down who reads them."""

    def __init__(self, samples: Any, file: Any) -> None:
        self._samples, self._file = samples, file

    @property
    def __class__(self) -> Any:  # for isinstance
        return type(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> Any:
        tokens = self._samples[i]
        self._file.write(f"{i} {hashlib.sha256(tokens.tobytes()).hexdigest()}\n")
        return tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._samples, name)
