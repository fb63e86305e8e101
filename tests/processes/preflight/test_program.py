"""tools/preflight.py as an operator runs it: a table and figures where all is well, one message where it is not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_data import VOCAB_SIZE, write_tiny_data

ROOT = Path(__file__).parents[3]
TORCHRUN = str(Path(sys.executable).parent / "torchrun")
PROGRAM = str(ROOT / "tools" / "preflight.py")
SMALL = ["--n-layers", "2", "--d-model", "32", "--seq-len", "32", "--vocab-size", str(VOCAB_SIZE)]
pytestmark = pytest.mark.timeout(300)  # starts of torch on a busy machine


def environment(**extra: str) -> dict[str, str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    return {**env, **extra}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_equal_ranks_pass(data, tmp_path):
    done = subprocess.run(
        [
            *(TORCHRUN, "--nproc-per-node", "2", PROGRAM, "--tp", "2", *SMALL, "--data-path", data),
            *("--save", str(tmp_path / "run"), "--json", str(tmp_path / "found.json")),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done
    assert done.stdout.count("preflight") == 1  # one rank speaks
    result = json.loads((tmp_path / "found.json").read_text())
    states = {row["check"]: row["state"] for row in result["rows"]}
    # What is slow beside another rank is a matter of what else this machine does meanwhile.
    assert list(states) == [
        "hosts", "versions", "settings", "data", "host memory", "open files", "compute", "model axis", "run folder",
        "disk space", "disk speed", "clocks",
    ]  # fmt: skip
    assert all(states[check] == "ok" for check in ("hosts", "versions", "settings", "data", "run folder", "clocks"))
    assert len(result["ranks"]) == 2 and len(result["measured"]["flops_per_s"]) == 2
    assert result["measured"]["links"][0]["ranks"] == [0, 1]
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_flags_are_told_so_by_one_and_do_not_hang(data, port):
    both = [
        subprocess.Popen(
            [sys.executable, PROGRAM, "--tp", "2", *SMALL, "--data-path", data, "--lr", f"{rank + 1}e-3"],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    (out, err), (out_1, err_1) = [process.communicate(timeout=280) for process in both]
    assert [process.returncode for process in both] == [2, 2], (err, err_1)
    assert "optim.lr is 0.001 on rank 0" in out and "start all ranks with the same flags" in out
    assert (err, out_1, err_1) == ("error: preflight failed: settings; each row says what to do\n", "", "")


def test_a_missing_rank_is_named(data, port):
    done = subprocess.run(
        [sys.executable, PROGRAM, "--tp", "2", *SMALL, "--data-path", data, "--wait-s", "2"],
        env=environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 of 2 ranks came within 2 s; missing: rank 1; ")
    assert done.stderr.count("\n") == 1
