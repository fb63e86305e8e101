"""tools/checkpoint.py as a user meets it: what it prints, its exit codes, what it leaves, and what it refuses."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megagpt.checkpoint.folders import find
from megagpt.checkpoint.integrity import damage_of
from megagpt.checkpoint.load import check_resumable, load_weights
from megagpt.checkpoint.state import read_state
from megagpt.config import RunConfig
from megagpt.errors import UserError, run_cli
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import named_parameters
from tests.checkpoint.written_checkpoint import MODEL, gpt2_tensors, weights_and_moments, write_checkpoint

ROOT = Path(__file__).parents[2]


@dataclass
class Outcome:
    """What the tool did."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> None:
        """Exit code 2 and one line that holds all the words."""
        lines = [line for line in self.err.splitlines() if line and not line.startswith("loading ")]
        assert self.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), self
        for word in words:
            assert word in self.err, f"{word!r} is not in {self.err!r}"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("checkpoint_tool", ROOT / "tools" / "checkpoint.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*args: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            run_cli(lambda: program.main([str(arg) for arg in args]))
        captured = capsys.readouterr()
        return Outcome(int(exit_info.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5)):
        write_checkpoint(tmp_path / "run", step, validation_loss=loss)
    return tmp_path / "run"


def flip_a_bit(folder: Path) -> str:
    """Damage one file; its path."""
    path = folder / "weight-00000-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return str(path)


def test_it_starts_without_torch():
    program = (
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tools')!r})\nimport checkpoint\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done


def test_help_teaches(tool):
    done = tool("--help")
    assert done.code == 0 and done.out.count("python tools/checkpoint.py") == 8 and "RUN@best" in done.out
    assert "exit code 0 nothing, 1 something" in tool("diff", "--help").out.replace("\n", " ").replace("  ", " ")


def test_list_shows_what_a_run_has(tool, run: Path):
    lines = tool("list", run).out.splitlines()
    assert lines[0].split() == ["step", "tokens", "validation", "loss", "layout", "size", "age"]
    rows = [line.split() for line in lines[1:]]
    assert [row[:3] for row in rows] == [["10", "640", "3.0000"], ["20", "1,280", "2.0000"], ["30", "1,920", "2.5000"]]
    assert rows[0][3:7] == ["tp=2", "pp=1", "dp=1", "zero=1"]
    assert [row[-1] for row in rows[1:]] == ["best", "latest"]
    flip_a_bit(run / "checkpoints" / "step-000020")
    lines = [line.rstrip() for line in tool("list", run, "--verify").out.splitlines()]
    assert lines[1].endswith("whole") and "DAMAGED" in "".join(lines[2:]) and lines[-1].endswith("latest, whole")


def test_list_shows_a_damaged_run(tool, run: Path):
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "step-000010" / "state.json").write_text("")
    done = tool("list", run)
    assert done.code == 0 and done.out.splitlines()[1].split()[:3] == ["10", "?", "?"] and "DAMAGED" in done.out
    assert "latest; it has the steps 10, 20, 30" in done.out
    tool("list", run.parent).refused("has no checkpoints; give the folder of a run")


def test_inspect_shows_tensors_in_numbers(tool, tmp_path: Path):
    tensors = gpt2_tensors()
    tensors["head.norm.bias"][3] = np.nan
    moments = {"exp_avg": gpt2_tensors(seed=1), "exp_avg_sq": gpt2_tensors(seed=2)}
    folder = write_checkpoint(tmp_path, 7, {"weight": tensors, **moments}, skipped_steps=[3, 5])
    done = tool("inspect", tmp_path)
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines()}
    values = tensors["blocks.1.mlp.up.weight"]
    figures = [f"{x:.4g}" for x in (np.linalg.norm(values.astype(float)), values.min(), values.max())]
    assert rows["blocks.1.mlp.up.weight"] == ["64", "x", "16", *figures]
    assert rows["head.norm.bias"][-1] == "1" and "1 values are NaN or Inf; the hashes were not looked at" in done.out
    n_parameters = sum(v.size for v in tensors.values())
    assert rows["parameters"] == [f"{n_parameters:,}"] and rows["skipped"] == ["steps", "3,", "5"]
    assert "(exp_avg)" not in done.out and "(exp_avg_sq)" in tool("inspect", folder, "--moments").out


def test_verify_names_damaged_files_and_offers_a_whole_checkpoint(tool, run: Path):
    assert tool("verify", run).code == 0 and tool("verify", f"{run}@20").code == 0
    files = [flip_a_bit(run / "checkpoints" / f"step-0000{step}") for step in (10, 30)]
    done = tool("verify", run)
    done.refused(f"2 of 3 checkpoints damaged; the newest whole one: --load {run}@20")
    for file in files:
        assert f"{file}: its contents have changed" in done.out
    assert "step-000020: whole" in done.out
    tool("verify", f"{run}@30").refused(f"1 of 1 checkpoints damaged; the newest whole one: --load {run}@20")
    flip_a_bit(run / "checkpoints" / "step-000020")
    tool("verify", run).refused("3 of 3 checkpoints damaged; no checkpoint of", "is whole")


def test_verify_looks_at_latest(tool, run: Path):
    (run / "checkpoints" / "latest").write_text("")
    done = tool("verify", run)
    done.refused("`latest` is damaged; the newest whole one", "@30")
    assert "latest holds ''" in done.out


def test_a_checkpoint_that_a_crash_left_under_another_name_is_looked_at(tool, run: Path):
    newest = run / "checkpoints" / "step-000030"
    newest.rename(f"{newest}.replaced")
    row = tool("list", run).out.splitlines()[-1].split()
    assert (row[0], row[-1]) == ("30", "latest")
    assert f"{newest}.replaced: whole" in tool("verify", run).out


def test_diff_is_like_diff(tool, run: Path, tmp_path: Path):
    done = tool("diff", run, f"{run}@30")
    assert (done.code, done.out) == (0, "0 of 84 tensors and 0 fields of the state differ\n")
    changed = weights_and_moments(seed=90)
    changed["exp_avg"]["head.norm.bias"][2] += 0.5
    other = write_checkpoint(tmp_path / "other", 30, changed, validation_loss=2.5, n_files=3, layout={"tp": 3})
    done = tool("diff", run, other)
    assert done.code == 1 and done.out.endswith("1 of 84 tensors and 4 fields of the state differ\n")
    words = [line.split() for line in done.out.splitlines()]
    assert ["layout.tp", "2", "3"] in words and ["layout.dp", "1", "None"] in words
    (row,) = [w for w in words if w and w[0] == "head.norm.bias"]
    assert row[1:6] == ["(exp_avg)", "values", "differ", "1", "0.5"]
    tool("diff", run, tmp_path / "nowhere").refused("no checkpoint in")


def test_reshape_and_average(tool, run: Path, tmp_path: Path):
    assert tool("reshape", run, "--files", 1, "--out", tmp_path / "one").code == 0
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 3
    assert tool("diff", run, tmp_path / "one").code == 0
    assert tool("average", run, "--last", 2, "--out", tmp_path / "mean").code == 0
    assert tool("average", f"{run}@20", f"{run}@30", "--out", tmp_path / "same").code == 0
    assert tool("diff", tmp_path / "mean", tmp_path / "same").code == 0
    assert damage_of(tmp_path / "mean") == []
    for args, words in {
        ("reshape", run, "--files", 1, "--out", tmp_path / "one"): ("one exists; give another --out",),
        ("average", run, "--out", tmp_path / "x"): ("one checkpoint has no mean", "--last N"),
        ("average", run, "--last", 4, "--out", tmp_path / "x"): ("--last 4", "has 3 checkpoints"),
        ("average", run, run, "--last", 2, "--out", tmp_path / "x"): ("got 2 names with --last",),
        ("reshape", run): ("the following arguments are required: --files, --out; see --help",),
    }.items():
        tool(*args).refused(*words)
    file = flip_a_bit(run / "checkpoints" / "step-000020")
    tool("average", run, "--last", 2, "--out", tmp_path / "x").refused(file, "the newest whole one", "@30")
    tool("reshape", f"{run}@20", "--files", 1, "--out", tmp_path / "x").refused(file)
    assert not (tmp_path / "x").exists()


def test_export_and_import(tool, run: Path, tmp_path: Path):
    done = tool("export", run, "--out", tmp_path / "hf")
    assert done.code == 0 and "hf, a gpt2; logits of transformers' own model differ by" in done.out, done
    tool("export", run, "--as", "bloom", "--out", tmp_path / "x").refused("cannot be a bloom of transformers")
    assert "note: without a tokenizer" in done.out
    done = tool("import", tmp_path / "hf", "--out", tmp_path / "back")
    assert done.code == 0 and f"train on: --load {tmp_path}/back --config {tmp_path}/back/config.yaml" in done.out, done
    done = tool("diff", run, tmp_path / "back", "--tensors-only")
    assert done.code == 1 and done.out.endswith("56 of 84 tensors and 0 fields of the state differ\n")
    assert [line.split() for line in done.out.splitlines()[1:3]] == [
        ["all", "28", f"({moment})", "only", "in", "the", "first"] for moment in ("exp_avg", "exp_avg_sq")
    ]  # fmt: skip
    tool("import", tmp_path / "run", "--out", tmp_path / "x").refused("run is a run of megagpt; give it as --load")
    tool("import", tmp_path, "--out", tmp_path / "x").refused("config.json: cannot be read")
    tool("export", run, "--out", tmp_path / "hf").refused("hf exists; give another --out")


def test_a_mean_is_evaluated_but_not_trained_on(tool, run: Path, tmp_path: Path):
    assert tool("average", run, "--last", 2, "--out", tmp_path / "mean").code == 0
    model = GPT(MODEL, SINGLE)
    load_weights(named_parameters(model), find(tmp_path / "mean"))
    ours = model.embedding.positions
    both = [gpt2_tensors(seed=3 * step)["embedding.positions"].astype(np.float64) for step in (20, 30)]
    assert ours is not None
    np.testing.assert_array_equal(ours.detach().numpy(), ((both[0] + both[1]) / 2).astype(np.float32))
    with pytest.raises(UserError, match=r"is a mean of 2 \(run/step-000020, .*without the optimizer's moments"):
        check_resumable(RunConfig(model=MODEL), read_state(tmp_path / "mean"), tmp_path / "mean")


def test_moving_averages_are_averaged_and_loaded_too(tool, run: Path, tmp_path: Path):
    """--weights ema takes the average that a run kept; where it kept none, it says so."""
    kept = tmp_path / "kept"
    for step in (1, 2):
        write_checkpoint(kept, step, {"weight": gpt2_tensors(seed=0), "ema": gpt2_tensors(seed=step)})
    assert tool("average", kept, "--last", 2, "--weights", "ema", "--out", tmp_path / "mean").code == 0
    assert read_state(tmp_path / "mean").origin == "mean of 2, ema (kept/step-000001, kept/step-000002)"
    first, second, of_mean = GPT(MODEL, SINGLE), GPT(MODEL, SINGLE), GPT(MODEL, SINGLE)
    load_weights(named_parameters(first), find(f"{kept}@1"), "ema")
    load_weights(named_parameters(second), find(f"{kept}@2"), "ema")
    load_weights(named_parameters(of_mean), find(tmp_path / "mean"))
    for a, b, mean in zip(first.parameters(), second.parameters(), of_mean.parameters(), strict=True):
        np.testing.assert_allclose(mean.detach(), (a.detach() + b.detach()) / 2, atol=1e-7)
    assert first.embedding.positions is not None
    np.testing.assert_array_equal(first.embedding.positions.detach(), gpt2_tensors(seed=1)["embedding.positions"])
    refused = tool("average", run, "--last", 2, "--weights", "ema", "--out", tmp_path / "x")
    refused.refused("step-000020 holds no ema, only weight, exp_avg, exp_avg_sq; choose among these")
    with pytest.raises(UserError, match=r"step-000030 has no average of the weights: .* use --weights last"):
        load_weights(named_parameters(first), find(run), "ema")


def test_the_last_checkpoints_are_averaged_by_a_command_of_its_own(tool, run: Path, tmp_path: Path):
    def averaged(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "average_checkpoints.py"), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = averaged(run, "--last", 2)
    assert done.returncode == 0, done.stderr
    assert tool("average", run, "--last", 2, "--out", tmp_path / "same").code == 0
    assert tool("diff", run / "mean-of-last-2", tmp_path / "same").code == 0
    assert damage_of(run / "mean-of-last-2") == []
    again = averaged(run, "--last", 2)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "exists; give another --out" in again.stderr
