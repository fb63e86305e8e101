"""What asks a run to end from outside: the end of the processes above it."""

from __future__ import annotations

import signal
import subprocess
import sys
from threading import Event

import pytest

from megagpt.processes.signals import follow_process, is_deepspeed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells of another process's end")


def test_the_end_of_a_process_that_is_no_parent_is_told():
    told = Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        with subprocess.Popen(["sleep", "600"]) as other:
            follow_process(other.pid)
            assert not told.wait(0.1)
            other.kill()
        assert told.wait(60.0)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("line", "followed"),
    [
        ("/venv/bin/python /venv/bin/deepspeed --quiet train.py", True),
        ("python -m deepspeed.launcher.runner train.py", True),
        ("bash -c", False),
        ("python -u -m deepspeed.launcher.launch train.py", False),
        ("python train.py --save runs/deepspeed", False),
    ],
)
def test_the_deepspeed_command_is_known_from_a_shell(line: str, followed: bool):
    assert is_deepspeed(line.split()) == followed
