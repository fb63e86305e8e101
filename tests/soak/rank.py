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

from megagpt.train.pretrain import pretrain


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
    gc.freeze()  # as in processes/local.py
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
    run: Any = importlib.import_module("megagpt.train.text")
    build_splits = run.build_splits
    file = path.open("a", buffering=1, encoding="ascii")

    def recorded(*args: Any, **kwargs: Any) -> Any:
        train_samples, *others = build_splits(*args, **kwargs)
        kind = type(train_samples)

        def read(self: Any, i: int) -> Any:
            tokens = kind.__getitem__(self, i)
            file.write(f"{i} {hashlib.sha256(tokens.tobytes()).hexdigest()}\n")
            return tokens

        train_samples.__class__ = type(kind.__name__, (kind,), {"__getitem__": read})  # of these alone
        return (train_samples, *others)

    run.build_splits = recorded
