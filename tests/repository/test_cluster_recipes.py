"""examples/cluster: scripts parse, their flags are ours, and the launchers' own readers take their files."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile
from torch.distributed.run import get_args_parser

from megagpt.cli import parse_run_config
from megagpt.plan.plan import make_plan

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
SCRIPTS = sorted([*CLUSTER.glob("*.sh"), *CLUSTER.glob("*.sbatch")])
RECIPES = [script for script in SCRIPTS if script.stem not in ("env", "supervise")]


def words_of(script: Path, name: str) -> list[str]:
    """The words of a bash array `name=( … )` of a script."""
    found = re.search(rf"^{name}=\(\n(.*?)^\)", script.read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{script}: no array {name}"
    return shlex.split(found[1])


def test_there_is_a_recipe_for_each_launcher():
    assert [script.name for script in RECIPES] == [
        "deepspeed.sh",
        "slurm.sbatch",
        "slurm_torchrun.sbatch",
        "torchrun.sh",
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_bash_parses_it(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    command = ["shellcheck", "-x", "-P", str(CLUSTER), "-P", str(CLUSTER.parents[1]), *map(str, SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", RECIPES, ids=lambda s: s.name)
def test_its_flags_are_a_run_that_16_gpus_can_do(script: Path):
    config = parse_run_config([*words_of(script, "train"), "--vocab-size", "50257"])
    plan = make_plan(config, 16)
    assert (plan.tp, plan.pp, plan.dp) == (4, 2, 2)
    assert max(stage.memory.total for stage in plan.stages) < 40 * 2**30
    assert config.checkpoint.auto_resume and config.checkpoint.save_interval


def test_all_recipes_train_the_same():
    assert len({tuple(words_of(script, "train")) for script in RECIPES}) == 1


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm_torchrun.sbatch"])
def test_torchrun_knows_its_flags(name: str):
    words = words_of(CLUSTER / name, "launch")
    flags = words[words.index(next(w for w in words if w.endswith("torchrun"))) + 1 :]
    start = re.search(r"^[^#\n]*?(--max-restarts.*?)examples/", (CLUSTER / name).read_text(), re.DOTALL | re.MULTILINE)
    assert start
    flags += start[1].replace("\\\n", " ").split()
    values = {"$hosts": "2", "$SLURM_NNODES": "2"}
    options = get_args_parser().parse_args([values.get(flag, flag) for flag in flags] + ["program.py"])
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2", "8", 20)


def test_deepspeed_reads_the_hostfile():
    assert dict(fetch_hostfile(str(CLUSTER / "hostfile"))) == {"node-a": 8, "node-b": 8}


def test_deepspeeds_environment_is_the_one_that_is_explained():
    """DeepSpeed splits every line at "=": a comment or an empty one would end it with a traceback."""
    pairs = [line.split("=", maxsplit=1) for line in (CLUSTER / ".deepspeed_env").read_text().splitlines()]
    explained = re.findall(r"^export (\w+)=(\S+)$", (CLUSTER / "env.sh").read_text(), re.MULTILINE)
    assert [tuple(pair) for pair in pairs] == explained


def supervise(tmp_path: Path, codes: list[int], times: int) -> tuple[int, int, str]:
    """Exit code, number of starts and messages of supervise.sh over a command that ends with these codes."""
    left = tmp_path / "codes"
    left.write_text("".join(f"{code}\n" for code in codes))
    program = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[1]); first, *rest = p.read_text().split();"
        "p.write_text(' '.join(rest)); sys.exit(int(first))"
    )
    done = subprocess.run(
        [str(CLUSTER / "supervise.sh"), str(times), sys.executable, "-c", program, str(left)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "SUPERVISE_PAUSE_S": "0"},
    )  # fmt: skip
    return done.returncode, len(codes) - len(left.read_text().split()), done.stderr


@pytest.mark.parametrize(
    ("codes", "times", "ended_with", "starts"),
    [
        ([0], 3, 0, 1),
        ([2, 0], 3, 2, 1),  # a user's error would only come again
        ([1, 0], 3, 1, 1),
        ([75, 69, 137, 0], 3, 0, 4),
        ([69, 69, 69, 0], 2, 69, 3),
    ],
)
def test_the_supervisor_goes_by_exit_codes(tmp_path, codes: list[int], times: int, ended_with: int, starts: int):
    code, started, told = supervise(tmp_path, codes, times)
    assert (code, started) == (ended_with, starts), told
    assert told.count("starting again") == starts - 1
