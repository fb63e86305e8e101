"""This machine, and what it says of its processes."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def machine_id() -> str:
    """The same for two processes that see each other's process ids and local addresses, and only then."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([boot, os.readlink("/proc/self/ns/pid"), os.readlink("/proc/self/ns/net")])
    except OSError:  # not Linux
        return socket.gethostname()


def process_state(pid: int) -> str:
    """What the system says of a process of this machine: "gone", "stopped", "runs" or, without /proc, "unknown"."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone" if Path("/proc/self/stat").exists() else "unknown"
    letter = status.rpartition(")")[2].split()[0]
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(letter, "runs")
