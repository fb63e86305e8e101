"""tools/checkpoint.py as a user meets it: what it prints, its exit codes, what it leaves, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megagpt import hf_export
from megagpt.checkpoint.folders import find
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.state import check_resumable, read_state
from megagpt.checkpoint.whole import damage_of
from megagpt.cli import read_config
from megagpt.config import DataConfig, ParallelConfig, RunConfig, TrainConfig
from megagpt.data.tokenizer import tokenizer_of_run
from megagpt.engine import checkpoint, masters
from megagpt.engine.restore import load_weights
from megagpt.errors import UserError, run_cli
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.local import run_ranks
from megagpt.parity_rank import start_engine
from tests.written_checkpoint import MODEL, gpt2_tensors, write_checkpoint

ROOT = Path(__file__).parents[1]


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
    changed = {key: gpt2_tensors(seed=90 + i) for i, key in enumerate(("weight", "exp_avg", "exp_avg_sq"))}
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


def hf_folder(folder: Path, **save: object) -> transformers.GPT2LMHeadModel:
    """A random GPT-2 as transformers itself saves it; biases and gains too, that initialisation leaves at 0 and 1."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=37)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder, **save)  # pyright: ignore[reportArgumentType]
    return model.eval()


def test_import_and_export_give_transformers_files_back(tool, tmp_path: Path):
    hf_folder(tmp_path / "hf")
    done = tool("import", tmp_path / "hf", "--out", tmp_path / "run")
    assert done.code == 0 and f"train on: --load {tmp_path}/run" in done.out, done
    assert damage_of(tmp_path / "run" / "checkpoints" / "step-000000") == []
    done = tool("export", tmp_path / "run", "--out", tmp_path / "back")
    assert done.code == 0 and "note: without a tokenizer" in done.out, done
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert theirs.keys() == ours.keys()
    for name, values in theirs.items():
        assert values.tobytes() == ours[name].tobytes(), name
    tokens = torch.arange(8)[None]
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "back")]
    assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)


def test_shards_and_other_number_formats_are_imported(tool, tmp_path: Path):
    hf_folder(tmp_path / "hf")
    hf_folder(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("hf", "shards"):
        assert tool("import", tmp_path / name, "--out", tmp_path / f"from-{name}").code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    assert tool("import", tmp_path / "bf16", "--out", tmp_path / "from-bf16").code == 0
    name, their_name = "blocks.1.mlp.up.bias", "transformer.h.1.mlp.c_fc.bias"
    with Reader(tmp_path / "from-bf16" / "checkpoints" / "step-000000") as reader:
        expected = model.get_parameter(their_name).detach().float().numpy()
        np.testing.assert_array_equal(reader.read("weight", name), expected)


def spoil(folder: Path, case: str) -> None:
    """Make an HF folder into one that cannot be imported."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    match case:
        case "pickle":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        case "nothing":
            (folder / "model.safetensors").unlink()
        case "another kind":
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
        case "text":
            (folder / "config.json").write_text(json.dumps(config | {"n_layer": "2"}))
        case "no JSON":
            (folder / "config.json").write_text("{")
        case "layers":
            (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
        case "nan":
            tensors["transformer.ln_f.bias"][0] = np.nan
            save_file(tensors, folder / "model.safetensors")
        case "shape":
            tensors["transformer.wpe.weight"] = np.zeros((9, 16), np.float32)
            save_file(tensors, folder / "model.safetensors")
        case "truncated":
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
        case "map":
            places = dict.fromkeys(tensors, "../model.safetensors")
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


REFUSED = {
    "pickle": ("pytorch_model.bin is a pickle, which can run code", "save_pretrained"),
    "nothing": ("has neither model.safetensors nor model.safetensors.index.json",),
    "another kind": ("config.json: ", "model_type='llama', wanted 'gpt2'"),
    "text": ("config.json: a value is of another type",),
    "no JSON": ("config.json: cannot be read as JSON",),
    "layers": ("the weights have no transformer.h.2.ln_1.weight",),
    "nan": ("model.safetensors: transformer.ln_f.bias holds a NaN or Inf",),
    "shape": ("transformer.wpe.weight has shape (9, 16), wanted (8, 16)",),
    "truncated": ("model.safetensors: cannot be read",),
    "map": ("lies in '../model.safetensors', wanted a .safetensors file beside it",),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(tool, tmp_path: Path, case: str):
    hf_folder(tmp_path / "hf")
    spoil(tmp_path / "hf", case)
    tool("import", tmp_path / "hf", "--out", tmp_path / "run").refused(*REFUSED[case])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_export_that_computes_something_else_is_refused(tool, run: Path, tmp_path: Path, monkeypatch):
    def swapped(read: Callable, config):
        lazy = hf_export_lazy(read, config)
        a, b = "transformer.h.0.ln_1.bias", "transformer.h.0.ln_2.bias"
        return lazy | {a: lazy[b], b: lazy[a]}

    hf_export_lazy = hf_export.lazy_to_hf_gpt2
    monkeypatch.setattr(hf_export, "lazy_to_hf_gpt2", swapped)
    tool("export", run, "--out", tmp_path / "hf").refused("the logits of transformers' model differ by", "not exported")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_float64_decides_where_fp32_differs(tool, run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(hf_export.ALLOWED, torch.float32, 0.0)
    done = tool("export", run, "--out", tmp_path / "hf")
    assert done.code == 0 and float(re.findall(r"differ by (\S+)", done.out)[0]) < 1e-12, done


def test_architectures_without_a_place_in_transformers_are_refused(tool, tmp_path: Path):
    config = asdict(RunConfig(model=replace(MODEL, position="alibi")))
    write_checkpoint(tmp_path / "run", config=config)
    tool("export", tmp_path / "run", "--out", tmp_path / "hf").refused("model.position=alibi cannot be exported")
    assert not (tmp_path / "hf").exists()


@pytest.fixture(scope="module")
def gpt2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of a byte-level BPE of 293 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=293, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    tokenizer.model.save(str(folder))
    return folder


def test_the_tokenizer_travels_with_the_weights(tool, tmp_path: Path, gpt2_tokenizer: Path):
    files = shutil.copytree(gpt2_tokenizer, tmp_path / "tokenizer")
    data = DataConfig(tokenizer="gpt2", vocab_file=str(files / "vocab.json"), merge_file=str(files / "merges.txt"))
    model = replace(MODEL, vocab_size=293)
    tensors = {"weight": gpt2_tensors(model)}
    write_checkpoint(tmp_path / "run", 0, tensors, config=asdict(RunConfig(model=model, data=data)))
    done = tool("export", tmp_path / "run", "--out", tmp_path / "hf")
    assert done.code == 0 and "note" not in done.out, done
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = tokenizer_of_run(data)
    text = "def test(): return {'a': 1}\n"
    assert ours is not None and theirs(text)["input_ids"] == ours.encode(text)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == ours.eod
    assert tool("import", tmp_path / "hf", "--out", tmp_path / "back").code == 0
    at = read_state(tmp_path / "back" / "checkpoints" / "step-000000")
    again = tokenizer_of_run(read_config(at.config, "state").data)
    assert again is not None and again.sha256 == ours.sha256 and again.files[0].is_relative_to(tmp_path / "back")
    (files / "vocab.json").unlink()
    done = tool("export", tmp_path / "run", "--out", tmp_path / "hf-2")
    assert done.code == 0 and "note: without a tokenizer: " in done.out and "vocab.json: cannot be read" in done.out


def test_a_sentencepiece_tokenizer_gives_the_same_ids_there(tool, tmp_path: Path):
    SentencePieceTrainer.train(
        input=__file__, model_prefix=str(tmp_path / "small"), model_type="bpe", vocab_size=600, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    data = DataConfig(tokenizer="sentencepiece", tokenizer_model=str(tmp_path / "small.model"))
    model = replace(MODEL, vocab_size=600)
    config = asdict(RunConfig(model=model, data=data))
    write_checkpoint(tmp_path / "run", 0, {"weight": gpt2_tensors(model)}, config=config)
    done = tool("export", tmp_path / "run", "--out", tmp_path / "hf")
    assert done.code == 0 and "note" not in done.out, done
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours, text = tokenizer_of_run(data), Path(__file__).read_text(encoding="utf-8")
    assert ours is not None and theirs(text)["input_ids"] == ours.encode(text)
    assert tool("import", tmp_path / "hf", "--out", tmp_path / "back").code == 0
    at = read_state(tmp_path / "back" / "checkpoints" / "step-000000")
    assert at.config["data"]["tokenizer"] == "sentencepiece"


def test_a_tokenizer_that_transformers_reads_otherwise_is_left_out(
    tool, tmp_path: Path, gpt2_tokenizer: Path, monkeypatch
):
    monkeypatch.setitem(hf_export.SETTINGS, "gpt2", {"tokenizer_class": "LlamaTokenizer"})
    files = {"vocab_file": str(gpt2_tokenizer / "vocab.json"), "merge_file": str(gpt2_tokenizer / "merges.txt")}
    model, data = replace(MODEL, vocab_size=293), DataConfig(tokenizer="gpt2", **files)  # pyright: ignore
    config = asdict(RunConfig(model=model, data=data))
    write_checkpoint(tmp_path / "run", 0, {"weight": gpt2_tensors(model)}, config=config)
    done = tool("export", tmp_path / "run", "--out", tmp_path / "hf")
    assert done.code == 0 and "note: without a tokenizer: transformers reads its files as another one" in done.out, done
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}


def start_from(config: RunConfig, run: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weights and first moments of an engine that begins with an imported model."""
    engine = start_engine(config, 1)
    at = checkpoint.load(engine, find(run))
    assert at.step == 0
    held = {
        n.name: tuple(masters.read(engine, n, key).float().numpy().copy() for key in ("weight", "exp_avg"))
        for n in engine.parameters
    }
    engine.close()
    return held  # pyright: ignore[reportReturnType]


def test_training_begins_with_imported_weights_and_no_moments(tool, tmp_path: Path):
    hf_folder(tmp_path / "hf")
    assert tool("import", tmp_path / "hf", "--out", tmp_path / "run").code == 0
    config = RunConfig(
        model=MODEL, parallel=ParallelConfig(pp=2), train=TrainConfig(seed=7, micro_batch_size=1, global_batch_size=2)
    )
    held: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for rank in run_ranks(start_from, 2, config, tmp_path / "run"):
        held |= rank
    with Reader(tmp_path / "run" / "checkpoints" / "step-000000") as reader:
        assert held.keys() == reader.index["weight"].keys()
        for name, (weight, moment) in held.items():
            np.testing.assert_array_equal(weight, reader.read("weight", name), name)
            assert not moment.any()


def test_a_mean_is_evaluated_but_not_trained_on(tool, run: Path, tmp_path: Path):
    assert tool("average", run, "--last", 2, "--out", tmp_path / "mean").code == 0
    model = GPT(MODEL, SINGLE)
    load_weights(model, find(tmp_path / "mean"))
    ours = model.embedding.positions
    both = [gpt2_tensors(seed=3 * step)["embedding.positions"].astype(np.float64) for step in (20, 30)]
    assert ours is not None
    np.testing.assert_array_equal(ours.detach().numpy(), ((both[0] + both[1]) / 2).astype(np.float32))
    with pytest.raises(UserError, match=r"is a mean of 2 \(run/step-000020, .*without the optimizer's moments"):
        check_resumable(RunConfig(model=MODEL), read_state(tmp_path / "mean"), tmp_path / "mean")
