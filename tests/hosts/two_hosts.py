"""Two "hosts" on one machine: network namespaces joined by a veth pair, each with its own address and host name.

They share processes, disk and clock, and nothing of the network: what reaches the other host went over the link,
which can be cut. Needs root and iproute2 (Linux).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ETC = Path("/etc/netns")  # `ip netns exec` lays the files of ETC/NAMESPACE over /etc


@dataclass(frozen=True)
class Host:
    """One side. name: its host name, which /etc/hosts of both resolves to the addresses."""

    name: str
    namespace: str
    address: str
    interface: str = "veth0"

    def start(self, command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path) -> subprocess.Popen[bytes]:
        """Start a command on this host, its output to a file."""
        # `ip netns exec` keeps the UTS namespace; `exec` makes all of it one process, the command's own.
        shell = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name]
        with log.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *shell, *command],
                env=dict(env),
                cwd=cwd,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def run(self, *command: str, timeout_s: float = 30.0) -> str:
        """Run a short command on this host; returns its output."""
        command = ("ip", "netns", "exec", self.namespace, *command)
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout_s).stdout

    def pids(self) -> list[int]:
        """Every process that runs on this host."""
        return [int(pid) for pid in ip("netns", "pids", self.namespace).split()]


@dataclass(frozen=True)
class TwoHosts:
    """The two, a and b."""

    a: Host
    b: Host

    def __iter__(self) -> Iterator[Host]:
        yield from (self.a, self.b)

    def cut(self) -> None:
        """Take the link down: packets are lost, and no connection is told."""
        ip("-n", self.a.namespace, "link", "set", self.a.interface, "down")

    def mend(self) -> None:
        """Bring the link up again."""
        ip("-n", self.a.namespace, "link", "set", self.a.interface, "up")


def why_not() -> str | None:
    """The reason why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"network namespaces need the program `{tool}` (Debian: iproute2, util-linux)"
    probe = f"megagpt-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return f"`ip netns add` fails here: {made.stderr.strip()}" if made.returncode else None


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Make the two hosts; at the end kill what runs on them, and remove all traces, whatever happened."""
    number = os.getpid()
    hosts = TwoHosts(
        Host("node-a", f"megagpt-a-{number}", "10.213.77.1"), Host("node-b", f"megagpt-b-{number}", "10.213.77.2")
    )
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
            (ETC / host.namespace).mkdir(parents=True, exist_ok=True)
            names = "".join(f"{h.address} {h.name}\n" for h in hosts)
            (ETC / host.namespace / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        ends = [word for h in hosts for word in ("name", h.interface, "netns", h.namespace)]
        ip("link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
        for host in hosts:
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                ip("-n", host.namespace, "link", "set", interface, "up")
        yield hosts
    finally:
        for host in hosts:
            _remove(host)


def ip(*words: str) -> str:
    """Run `ip`; returns its output."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _remove(host: Host) -> None:
    listed = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True)
    for pid in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself meanwhile
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)  # and its end of the link
    shutil.rmtree(ETC / host.namespace, ignore_errors=True)
    if ETC.exists() and not any(ETC.iterdir()):
        ETC.rmdir()
