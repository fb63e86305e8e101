"""Forked ranks without what makes them heavy: codes, signals, environment, and their end without a parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megagpt.errors import EXIT_PEER_LOST, EXIT_STOPPED

ROOT = Path(__file__).parents[2]


PROGRAM = """\
import os, signal, sys, time
from pathlib import Path
from megagpt.processes import forked

folder = Path(sys.argv[1])

def ready():
    (folder / f"ready-{os.environ['RANK']}").write_text(str(os.getpid()))

def main():
    rank = int(os.environ["RANK"])
BODY
    os._exit(0)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
BEFORE
sys.exit(forked.run_forked(2, main))
"""


def start(body: str, folder: Path, before: str = "") -> subprocess.Popen[str]:
    """A program whose two ranks run `body`, which knows `rank`, `folder` and `ready()`."""
    indented = textwrap.indent(textwrap.dedent(body), "    ")
    program = PROGRAM.replace("BODY", indented).replace("BEFORE", before)
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(*paths: Path) -> None:
    deadline_s = time.monotonic() + 60.0
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline_s, paths
        time.sleep(0.01)


CODES = {
    "all well": ("pass", 0),
    "one fails": ("os._exit(2 * rank)", 2),
    "stopped": ("os._exit(75)", EXIT_STOPPED),
    "one is killed": ("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(0.5)", EXIT_PEER_LOST),
    "the other would wait for ever": ("os._exit(2) if rank else time.sleep(1000)", 2),
}


@pytest.mark.parametrize("name", CODES)
def test_the_exit_code_is_that_of_the_ranks(name: str, tmp_path: Path):
    body, code = CODES[name]
    with start(body, tmp_path, before="forked.GRACE_S = 1.0") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == ("note: a rank was killed by signal 9 (9: often for lack of memory)\n" if "killed" in name else "")


def test_each_rank_knows_its_place(tmp_path: Path):
    body = 'print(*(os.environ.get(f"{name}") for name in sys.argv[2:]), flush=True)'
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR TORCHELASTIC_USE_AGENT_STORE"
    with start(body, tmp_path, before=f"sys.argv += {names!r}.split()") as process:
        out, _ = process.communicate(timeout=60)
    assert sorted(out.splitlines()) == [f"{rank} {rank} 2 2 127.0.0.1 None" for rank in range(2)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_are_handed_on(number: signal.Signals, tmp_path: Path):
    body = f"signal.signal({int(number)}, lambda *_: os._exit(75))\nready()\ntime.sleep(1000)"
    with start(body, tmp_path) as process:
        wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
        process.send_signal(number)
        assert process.wait(60) == EXIT_STOPPED


def test_ranks_that_do_not_listen_yet_end_by_the_signal(tmp_path: Path):
    with start("ready()\ntime.sleep(1000)", tmp_path) as process:
        wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM


def test_nohup_holds(tmp_path: Path):
    body = "ready()\ntime.sleep(0.5)"
    with start(body, tmp_path, before="signal.signal(signal.SIGHUP, signal.SIG_IGN)") as process:
        wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 0


def test_ranks_follow_a_parent_that_is_killed(tmp_path: Path):
    """They get SIGTERM, upon which a run saves and ends."""
    body = """
        def note(*_):
            (folder / f"told-{rank}").write_text("told")
            os._exit(75)

        signal.signal(signal.SIGTERM, note)
        ready()
        time.sleep(1000)
        """
    with start(body, tmp_path) as process:
        wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
        process.kill()
        wait_for(tmp_path / "told-0", tmp_path / "told-1")
