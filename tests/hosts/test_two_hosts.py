"""Several hosts, for real but for the wire: two network namespaces, two ranks each, tp inside a host, pp or dp across.

The launchers and the program are those of a cluster. Root is needed to make the hosts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts.two_hosts import Host, TwoHosts, two_hosts, why_not
from tests.tiny_data import VOCAB_SIZE, write_tiny_data

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROGRAM = str(ROOT / "examples" / "pretrain_gpt.py")
SMALL = [
    "--n-layers", "2", "--d-model", "32", "--seq-len", "32", "--vocab-size", str(VOCAB_SIZE), "--eval-steps", "0",
    "--global-batch-size", "8", "--micro-batch-size", "2", "--warmup-steps", "2", "--lr", "0.01",
    "--model.dropout-residual", "0.1", "--optim.decay-steps", "1000",
]  # fmt: skip
HEARTBEAT_S = 10.0  # an import that holds the lock of Python takes seconds on a busy machine
# Noticed after HEARTBEAT_S; then some seconds until one has spoken, all have ended, and the launchers have seen it.
END_WITHIN_S = HEARTBEAT_S + 30.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # several starts of torch on a busy machine
    pytest.mark.skipif(why_not() is not None, reason=why_not() or "possible here"),
]


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data") / "tiny")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def torchrun(
    hosts: TwoHosts, folder: Path, arguments: list[str], program: str = PROGRAM, first_on_b: tuple[str, ...] = ()
) -> list[subprocess.Popen[bytes]]:
    """Start the program by torchrun on each host; output goes to folder/HOST.log."""
    rendezvous = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.a.name}:29500"]
    command = [str(BIN / "torchrun"), *rendezvous, "--rdzv-id", "test", "--nproc-per-node", "2", program, *arguments]
    return [
        host.start([*first, *command], environment(), folder / f"{host.name}.log", folder)
        for host, first in ((hosts.a, ()), (hosts.b, first_on_b))
    ]


def output(folder: Path, host: Host) -> str:
    return (folder / f"{host.name}.log").read_text()


def wait_until(true: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s, what()
        time.sleep(0.1)


def losses(run: Path) -> dict[int, str]:
    """Step -> its loss, as a hexadecimal float."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return {row["step"]: float(row["loss"]).hex() for row in map(json.loads, lines)}


@pytest.mark.parametrize("layout", [["--tp", "2", "--pp", "2"], ["--tp", "2", "--zero-stage", "2"]], ids=["pp", "dp"])
def test_a_cut_link_ends_all_ranks_and_the_restart_goes_on_exactly(hosts, data, tmp_path, layout):
    arguments = [*SMALL, *layout, "--data-path", data, "--save-interval", "5", "--train-steps", "60"]
    arguments += ["--faults.heartbeat-timeout-s", str(HEARTBEAT_S), "--auto-resume", "--save"]
    cut_run, whole_run = tmp_path / "cut", tmp_path / "whole"
    launchers = torchrun(hosts, tmp_path, [*arguments, str(cut_run)])
    wait_until(
        lambda: len(losses(cut_run)) >= 12 or any(launcher.poll() is not None for launcher in launchers),
        600,
        lambda: output(tmp_path, hosts.a) + output(tmp_path, hosts.b),
    )
    ranks = [pid for host in hosts for pid in ranks_on(host)]
    assert len(ranks) == 4
    hosts.cut()
    cut_at_s = time.monotonic()
    # Meanwhile, without hosts: the same run, which nobody cuts.
    command = [str(BIN / "torchrun"), "--nproc-per-node", "4", PROGRAM, *arguments, str(whole_run)]
    with (
        (tmp_path / "whole.log").open("wb") as log,
        subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT) as whole,
    ):
        wait_until(lambda: not any(alive(pid) for pid in ranks), END_WITHIN_S, lambda: f"still alive: {ranks}")
        print(f"all ranks ended {time.monotonic() - cut_at_s:.1f} s after the cut")
    assert whole.returncode == 0, (tmp_path / "whole.log").read_text()
    for launcher in launchers:  # torchrun on host b waits for its store on host a, for minutes
        launcher.kill()
        launcher.wait(30)
    for host, lost in ((hosts.a, hosts.b), (hosts.b, hosts.a)):  # each side can know only of the other
        (error,) = re.findall("^error: .*", output(tmp_path, host), re.MULTILINE)
        assert re.search(rf" on {lost.name} gave no sign of life for 10 s ", error), error

    hosts.mend()
    assert len(losses(cut_run)) < 60
    again = torchrun(hosts, tmp_path, [*arguments, str(cut_run)])
    assert [launcher.wait(600) for launcher in again] == [0, 0], output(tmp_path, hosts.a)
    assert "going on from" in output(tmp_path, hosts.a)
    assert losses(cut_run) == losses(whole_run)
    assert len(losses(cut_run)) == 60


def test_preflight_reaches_both_hosts_and_finds_a_folder_that_is_not_shared(hosts, data, tmp_path):
    """Host b has a file system of its own where the run folder would be."""
    shared = tmp_path / "shared"
    shared.mkdir()
    # In the mount namespace that `ip netns exec` makes: it ends with the command.
    own_disk = ("sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(shared))
    arguments = [*SMALL, "--tp", "2", "--pp", "2", "--data-path", data, "--save", str(shared / "run")]
    arguments += ["--json", str(tmp_path / "found.json")]
    launchers = torchrun(hosts, tmp_path, arguments, str(ROOT / "tools" / "preflight.py"), own_disk)
    assert all(launcher.wait(600) != 0 for launcher in launchers)
    told = output(tmp_path, hosts.a)
    (error,) = re.findall("^error: .*", told, re.MULTILINE)  # on a busy machine a link may be found slow too
    assert re.search(r"preflight failed: .*\brun folder\b", error), told
    result = json.loads((tmp_path / "found.json").read_text())
    rows = {row["check"]: row for row in result["rows"]}
    assert rows["hosts"]["finding"] == "4 ranks on 2 hosts: node-a 2, node-b 2; each connects to each"
    assert rows["data"]["finding"] == "3 hashes and sizes alike on 2 hosts"
    assert "ranks 2-3 (node-b) cannot see there what rank 0 has written" in rows["run folder"]["finding"]
    assert sorted(link["ranks"] for link in result["measured"]["links"]) == [[0, 1], [0, 2], [1, 3], [2, 3]]
    assert {"compute", "model axis", "pipe axis"} < rows.keys()


@pytest.mark.skipif(not (shutil.which("sshd") or Path("/usr/sbin/sshd").exists()), reason="needs openssh-server")
@pytest.mark.skipif(shutil.which("pdsh") is None, reason="needs pdsh")
def test_deepspeed_starts_both_hosts_by_ssh(hosts, data, tmp_path):
    """`deepspeed --hostfile`, as examples/cluster/deepspeed.sh does it: pdsh, ssh with a key, .deepspeed_env."""
    env = {**environment(), "PATH": f"{with_ssh(hosts, tmp_path)}:{os.environ['PATH']}"}
    (tmp_path / "hostfile").write_text("".join(f"{host.name} slots=2\n" for host in hosts))
    (tmp_path / ".deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME={hosts.a.interface}\nDS_ACCELERATOR=cpu\n")
    run = tmp_path / "run"
    command = [str(BIN / "deepspeed"), "--hostfile", "hostfile", PROGRAM, *SMALL, "--tp", "2", "--pp", "2"]
    command += ["--data-path", data, "--train-steps", "3", "--save", str(run)]
    launcher = hosts.a.start(command, env, tmp_path / "log", tmp_path)
    assert launcher.wait(600) == 0, (tmp_path / "log").read_text()
    told = (tmp_path / "log").read_text()
    assert "node-a: step 3/3 | loss " in told and "node-b: " in told
    assert len(losses(run)) == 3


def with_ssh(hosts: TwoHosts, folder: Path) -> Path:
    """Start sshd on both hosts, with keys of their own; returns a folder with an `ssh` that uses them."""
    for key in ("user", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPermitRootLogin yes\nStrictModes no\n"
        "UsePAM no\nPidFile none\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd refuses to start without it
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    for host in hosts:
        host.start([sshd, "-D", "-e", "-f", f"{folder}/sshd_config"], os.environ, folder / f"sshd-{host.name}", folder)
    tools = folder / "tools"
    tools.mkdir()
    (tools / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (tools / "ssh").chmod(0o755)
    for host in hosts:
        reach = ["timeout", "5", str(tools / "ssh"), host.name, "true"]
        wait_until(lambda: succeeds(hosts.a, reach), 30, lambda: "no ssh")  # noqa: B023  # called at once
    return tools


def succeeds(host: Host, command: list[str]) -> bool:
    try:
        host.run(*command)
    except subprocess.CalledProcessError:
        return False
    return True


def ranks_on(host: Host) -> list[int]:
    """The processes of the program itself on a host, without its launcher."""
    return [pid for pid in host.pids() if PROGRAM in command_of(pid)[1:3]]


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def alive(pid: int) -> bool:
    """Whether it still runs; one that ended and was not waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
