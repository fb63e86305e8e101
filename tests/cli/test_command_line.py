"""The command line and YAML files: who wins over whom, what is refused, what is written reads back."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.cli import parse_run_config, read_config, to_yaml
from megagpt.cli.flags import all_flags
from megagpt.cli.yaml_file import dotted_keys, read_yaml
from megagpt.config import CheckpointConfig, DataConfig, LogConfig, ModelConfig, OptimConfig, RunConfig
from megagpt.errors import ArgumentParser, UserError, home_expanded

REPOSITORY = Path(__file__).parents[2]


def plan_tool(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "plan.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_later_sources_win(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {n_layers: 6, seq_len: 512}\noptim: {lr: 3e-4}\n")
    (tmp_path / "b.yaml").write_text("model: {n_layers: 8}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    config = parse_run_config(["--seq-len", "128", *files, "--preset", "gpt2-small"])
    assert config.model.seq_len == 128  # flag over files, wherever it stands
    assert config.model.n_layers == 8  # second file over first
    assert config.optim.lr == 3e-4  # file over preset, though YAML 1.1 has 3e-4 as a word
    assert config.model.d_model == 768  # preset over default
    assert config.log.eval_interval == LogConfig().eval_interval  # default


def test_sources_are_checked_once_merged(tmp_path):
    """7 heads do not divide the default width: the flag that comes later mends it."""
    (tmp_path / "run.yaml").write_text("model: {n_heads: 7}\n")
    assert parse_run_config(["--config", str(tmp_path / "run.yaml"), "--d-model", "700"]).model.head_width == 100
    with pytest.raises(UserError, match=r"model\.d_model=192 with model\.n_heads=7"):
        parse_run_config(["--config", str(tmp_path / "run.yaml")])


def test_several_wrong_types_are_told_at_once(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {n_layers: four, d_model: 2.5}\ntrain: {precision: fp8}\n")
    with pytest.raises(UserError, match=r"model\.n_layers: got 'four'") as caught:
        parse_run_config(["--config", str(tmp_path / "run.yaml")])
    assert [line.split(": ")[0].strip() for line in caught.value.lines] == ["model.d_model", "train.precision"]


def test_no_arguments_give_the_defaults():
    assert parse_run_config([]) == RunConfig()


def test_what_launchers_append_is_ignored():
    config = parse_run_config(["--local_rank=3", "--deepspeed", "--tp", "2", "--deepspeed_config", "ds.json"])
    assert config.parallel.tp == 2
    assert config.train.deepspeed_config == "ds.json"


def test_every_setting_has_flags_that_are_its_own():
    flags = [flag for of_one in all_flags().values() for flag in of_one]
    assert list(all_flags()) == dotted_keys()
    assert len(flags) == len(set(flags))


def test_hyphens_and_underscores_are_the_same():
    assert parse_run_config(["--train_steps", "7"]) == parse_run_config(["--train-steps", "7"])


def test_a_blend_in_a_file_is_the_blend_of_the_command_line(tmp_path):
    (tmp_path / "list.yaml").write_text("data: {data_path: [0.7, A, 0.3, B]}\n")
    (tmp_path / "text.yaml").write_text("data: {data_path: 0.7 A 0.3 B}\n")
    typed = parse_run_config(["--data-path", "0.7", "A", "0.3", "B"])
    assert typed.data.data_path.prefixes == ("A", "B")
    for name in ("list.yaml", "text.yaml"):
        assert parse_run_config(["--config", str(tmp_path / name)]) == typed


def test_plain_words_of_a_file_are_those_of_yaml_1_2(tmp_path):
    """010, 1:30 and yes were numbers and a switch in YAML 1.1; in a text they are what they look like."""
    for text, word in (("010", "010"), ("1:30", "1:30"), ("yes", "yes"), ("2020-01-01", "2020-01-01"), ("0o17", None)):
        (tmp_path / "run.yaml").write_text(f"checkpoint: {{save: {text}}}\n")
        if word is None:
            with pytest.raises(UserError, match="got 15, wanted a valid string"):
                parse_run_config(["--config", str(tmp_path / "run.yaml")])
        else:
            assert parse_run_config(["--config", str(tmp_path / "run.yaml")]).checkpoint.save == word
    (tmp_path / "run.yaml").write_text("model: {n_layers: 0x10, vocab_size: ~}\noptim: {lr: .5, eps: 1e-3, clip: 2.}\n")
    config = parse_run_config(["--config", str(tmp_path / "run.yaml")])
    assert (config.model.n_layers, config.optim.lr, config.optim.eps, config.optim.clip) == (16, 0.5, 1e-3, 2.0)


BAD_YAML = {
    "unknown key": ("model: {n_layer: 4}", "unknown key model.n_layer; did you mean model.n_layers?"),
    "key outside its section": ("n_layers: 4", "unknown key n_layers; did you mean model.n_layers?"),
    "unknown section": ("modell: {n_layers: 4}", "unknown key modell"),
    "python tag": (
        "model: !!python/object/apply:os.system ['touch pwned']",
        ":1: tags such as tag:yaml.org,2002:python/object/apply:os.system are not supported",
    ),
    "tag": ("model: {n_layers: !!int ''}", ":1: tags such as tag:yaml.org,2002:int are not supported"),
    "huge number": ("model: {n_layers: 0x" + "f" * 5000 + "}", ":1: an integer of more than 64 bits"),
    "huge float": ("optim: {lr: " + "1" * 400 + "}", ":1: an integer of more than 64 bits"),
    "too many layers": ("model: {n_layers: 5000}", "model.n_layers=5000 must be at most 4096"),
    "NUL in a word": ('data: {split: "a\\0"}', ":1: a word with a NUL"),
    "half a surrogate pair": ('data: {"\\ud800": a}', ":1: found invalid Unicode character"),
    "too large": ("#" + " " * (4 << 20), "more than 4 MB"),
    "NaN": ("optim: {lr: .nan}", "optim.lr: got nan, wanted a finite number"),
    "infinity": ("optim: {lr: .inf}", "optim.lr: got inf, wanted a finite number"),
    "negative": ("model:\n  n_layers: -4", "model.n_layers=-4 must be positive; use 1 or more"),
    "negative decay": (
        "optim: {weight_decay: -0.1}",
        "optim.weight_decay=-0.1 must be finite and not negative",
    ),
    "dropout of 1": (
        "model: {dropout_residual: 1.0}",
        "model.dropout_residual=1.0 must be at least 0 and below 1",
    ),
    "text for a number": ("model: {n_layers: four}", "model.n_layers: got 'four', wanted a valid integer"),
    "fraction for an integer": ("model: {n_layers: 4.5}", "model.n_layers: got 4.5, wanted a valid integer"),
    "switch for a number": ("model: {n_layers: true}", "model.n_layers: got True, wanted a valid integer"),
    "number for a switch": ("parallel: {recompute: 1}", "parallel.recompute: got 1, wanted a valid boolean"),
    "no such choice": (
        "train: {precision: fp8}",
        "train.precision: got 'fp8', wanted 'fp32', 'bf16' or 'fp16'",
    ),
    "list for a section": ("model: [1, 2]", "model: got [1, 2], wanted keys with values"),
    "list at the top": ("- 1", "got [1], wanted sections (model, parallel"),
    "key twice": ("model:\n  n_layers: 4\n  n_layers: 5", ":3: key n_layers is there twice"),
    "section twice": ("model: {n_layers: 4}\nmodel: {n_heads: 4}", ":2: key model is there twice"),
    "alias": ("model: &a {n_layers: 4}\noptim: *a", ":2: aliases are not supported"),
    "not YAML": ("model: {n_layers: 4", ": did not find expected ',' or '}'"),
    "two documents": ("model: {n_layers: 4}\n---\nmodel: {n_layers: 5}", "but found another document"),
    "nested deep": ("[" * 100_000, "nested too deep"),
    "NUL byte": ("model: {n_layers: 4}\0", "control characters are not allowed"),
    "date": ("model: {n_layers: 2020-99-99}", "model.n_layers: got '2020-99-99', wanted a valid integer"),
    "leading zero": ("model: {n_layers: 010}", "model.n_layers: got '010', wanted a valid integer"),
    "leading zero of a fraction": ("optim: {lr: 01e-3}", "optim.lr: got '01e-3', wanted a valid number"),
    "base 60": ("train: {train_steps: 1:30}", "train.train_steps: got '1:30', wanted a valid integer"),
    "binary": ("model: {n_layers: 0b11}", "model.n_layers: got '0b11', wanted a valid integer"),
    "underscores": ("model: {n_layers: 1_0}", "model.n_layers: got '1_0', wanted a valid integer"),
    "yes": ("parallel: {recompute: yes}", "parallel.recompute: got 'yes', wanted a valid boolean (true or false)"),
    "keys without end": ("model:\n" + "".join(f"  k{i}: 1\n" for i in range(200_000)), ":1002: more than 1,000 keys"),
    "values without end": ("data: {data_path: [" + "a," * 70_000 + "]}", "more than 66,532 values"),
}


@pytest.mark.bad_input(49)
@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_one_line_that_names_the_file(name, tmp_path, monkeypatch):
    text, expected = BAD_YAML[name]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        parse_run_config(["--config", str(file)])
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(file))
    assert "\n" not in message
    assert not (tmp_path / "pwned").exists()


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"data: {split: \xe9}")
    for path, expected in [
        ("none.yaml", "No such file"),
        (".", "Is a directory"),
        ("latin.yaml", "byte 14 is not"),
    ]:
        with pytest.raises(UserError, match=expected):
            parse_run_config(["--config", str(tmp_path / path)])


BAD_FLAGS = {
    "unknown": (["--tpp", "2"], "unknown flag --tpp; did you mean --tp?"),
    "unknown, dotted": (
        ["--model.n-layer=3"],
        "unknown flag --model.n-layer; did you mean --model.n-layers?",
    ),
    "of Megatron": (["--num-layers", "3"], "unknown flag --num-layers; here it is --n-layers 3"),
    "of nobody": (["--out", "runs/a"], "unknown flag --out; see --help for what there is"),
    "the off form without its section": (
        ["--no-bias-attention"],
        "unknown flag --no-bias-attention; did you mean --model.no-bias-attention?",
    ),
    "value of a launcher's switch": (["--deepspeed", "ds.json"], "here it is --deepspeed-config ds.json"),
    "no flag": (["--tp", "2", "2"], "got '2', which belongs to no flag"),
    "not a number": (["--tp", "two"], "--tp: got 'two', wanted a valid integer; see --help"),
    "no value": (["--tp"], "argument --tp/--parallel.tp: expected one argument; see --help"),
    "value of a switch": (["--recompute=yes"], "--recompute takes no value, got 'yes'; --no-recompute turns it off"),
    "value of a switch off": (["--model.bias-mlp", "false"], "'false', which belongs to no flag; every value follows"),
    "NaN": (["--lr", "nan"], "--lr: got nan, wanted a finite number"),
    "infinity": (["--lr", "inf"], "--lr: got inf, wanted a finite number"),
    "negative": (["--n-layers", "-4"], "model.n_layers=-4 must be positive; use 1 or more"),
    "negative, with an exponent": (["--lr", "-1e-3"], "optim.lr=-0.001 must be positive; use a finite number above 0"),
    "huge number": (["--train-steps", "1" + "0" * 400], "train.train_steps=1000"),
    "too many layers": (["--n-layers", "5000"], "model.n_layers=5000 must be at most 4096"),
    "NaN dropout": (["--model.dropout-residual", "nan"], "--model.dropout-residual: got nan, wanted a finite number"),
    "no such choice": (["--precision", "fp8"], "--precision: got 'fp8', wanted 'fp32', 'bf16' or 'fp16'"),
    "no such number": (["--zero-stage", "7"], "--zero-stage: got '7', wanted 0, 1, 2 or 3"),
    "no list": (["--faults.skip-steps", "57,x"], "faults.skip_steps='57,x' has 'x', which is no step or range"),
    "unknown preset": (
        ["--preset", "gpt2-smal"],
        "--preset gpt2-smal is not known; did you mean gpt2-small?",
    ),
    "heads": (
        ["--n-heads", "5"],
        "model.d_model=192 with model.n_heads=5 must divide evenly; try n_heads in [1, 2",
    ),
    "ZeRO 2 with a pipeline": (["--pp", "2", "--zero-stage", "2"], "use --zero-stage 1, or --pp 1"),
    "no file": (["--config"], "argument --config: expected one argument"),
}


@pytest.mark.bad_input(49)
@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_are_one_line(name):
    argv, expected = BAD_FLAGS[name]
    with pytest.raises(UserError) as caught:
        parse_run_config(argv)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tool_exits_with_2_and_one_line(tmp_path):
    (tmp_path / "tag.yaml").write_text("model: !!python/name:os.system")
    done = plan_tool("--config", str(tmp_path / "tag.yaml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: .*tag.yaml:1: tags such as tag:yaml.org,2002:python/name:os.system are.*\n", done.stderr
    )


def test_help_teaches():
    done = plan_tool("--help")
    assert done.returncode == 0
    words = ["--world-size N", "--preset NAME", "parallel options", "--tp INT, --parallel.tp INT", "Peak learning"]
    assert not [word for word in words if word not in done.stdout]
    assert max(map(len, done.stdout.splitlines())) <= 100  # 80 but for examples and the four spellings of a switch


def test_help_tells_what_a_flag_would_change(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_run_config(["--preset", "gpt2-small", "--help"])
    assert caught.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--d-model INT, --model.d-model INT Width of the residual stream. (default: 768)" in told
    assert "--no-recompute, --parallel.no-recompute Recompute each block" in told
    assert "--data-path [WORD ...]" in told and "--zero-stage {0,1,2,3}" in told and "(default: dense)" in told


def test_a_switch_has_four_spellings_and_the_last_one_counts():
    for on, off in (("--recompute", "--no-recompute"), ("--parallel.recompute", "--parallel.no-recompute")):
        assert parse_run_config([off, on]).parallel.recompute
        assert not parse_run_config([on, off]).parallel.recompute
    assert not parse_run_config(["--model.no_bias_mlp"]).model.bias_mlp


def test_none_takes_back_what_a_preset_sets(tmp_path):
    assert parse_run_config(["--preset", "gpt2-small", "--vocab-size", "None"]).model.vocab_size is None
    assert parse_run_config(["--save", "None"]).checkpoint.save is None


def test_the_command_line_imports_no_torch():
    code = "import sys, megagpt.cli, megagpt.plan.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
ODD = ["1e-4", "null", "0.7", "yes", "2020-01-01", "None", " a", "a: b", "#", "é\u2028", "010", "0o7", "1:30", "~"]
VALUES = {
    "data_path": st.lists(words, max_size=1).map(tuple) | st.just(("0.70", "a b", "3", "c")),
    "split": st.sampled_from(["949,50,1", "0.90,0.1", "1"]),
    "save": st.none() | words | st.sampled_from(ODD),
    "lr": st.floats(1e-12, 1e6),
    "clip": st.floats(0, 1e6),
    "decay_steps": st.none() | st.integers(1, 2**63 - 1),
}


@settings(max_examples=20, deadline=None)
@given(st.fixed_dictionaries(VALUES))
def test_what_is_written_reads_back_equal(tmp_path_factory, values):
    config = RunConfig(
        data=DataConfig(data_path=values["data_path"], split=values["split"]),
        optim=OptimConfig(lr=values["lr"], clip=values["clip"], decay_steps=values["decay_steps"]),
        checkpoint=CheckpointConfig(save=values["save"]),
    )
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert read_config(read_yaml(file), str(file)) == config


@pytest.mark.parametrize("key", dotted_keys())
def test_every_setting_names_file_and_key(key, tmp_path):
    """A wrong type, for all; a value that its check refuses, for all that have one."""
    file, (section, name) = tmp_path / "run.yaml", key.split(".")
    file.write_text(f"{section}:\n  {name}: {{a: 1}}\n")
    with pytest.raises(UserError) as caught:
        parse_run_config(["--config", str(file)])
    assert str(caught.value).startswith(f"{file}: {key}: got {{'a': 1}}, wanted ")


ANY_TEXT = {"cache_dir", "tokenizer_model", "vocab_file", "merge_file", "save", "load"}
ANY_TEXT |= {"deepspeed_config", "wandb_project", "data_path", "sample_prompts", "chat_template", "frozen"}
ANY_TEXT |= {"base", "train_file", "valid_file", "test_file"}


@pytest.mark.parametrize("key", [key for key in dotted_keys() if key.split(".")[1] not in ANY_TEXT])
def test_every_refused_value_names_file_and_key(key, tmp_path):
    """Values of the right type, wherever something checks them; a flag that comes later is not blamed."""
    file, (section, name) = tmp_path / "run.yaml", key.split(".")
    (tmp_path / "good.yaml").write_text("debug: {detect_nan: true}\n")
    for bad in ("x,y z", -1, -0.5):
        file.write_text(f"{section}:\n  {name}: {bad}\n")
        with pytest.raises(UserError) as caught:
            parse_run_config(["--config", str(file), "--config", str(tmp_path / "good.yaml"), "--debug.check-ranks"])
        assert str(caught.value).startswith(f"{file}: {key}"), bad


def test_a_check_of_several_settings_names_who_set_one_last(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {d_model: 100}\n")
    (tmp_path / "b.yaml").write_text("model: {n_heads: 7}\nlog: {eval_steps: 1}\n")
    files = [f"--config={tmp_path / name}.yaml" for name in "ab"]
    told = "model.d_model=100 with model.n_heads=7 must divide evenly"
    for order, where in ((files, "b.yaml: "), (files[::-1], "a.yaml: "), ([*files, "--d-model", "100"], "")):
        with pytest.raises(UserError, match=told) as caught:
            parse_run_config(order)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path}/{where}{told}" if where else told)


def test_read_config_takes_what_a_checkpoint_carries():
    assert read_config({"model": {"n_layers": 2}}, "state.json") == RunConfig(model=replace(ModelConfig(), n_layers=2))
    with pytest.raises(UserError, match=r"^state\.json: model\.n_layers=0 must be positive"):
        read_config({"model": {"n_layers": 0}}, "state.json")
    with pytest.raises(UserError, match=r"^state\.json: unknown key model\.heads"):
        read_config({"model": {"heads": 0}}, "state.json")


def test_a_path_may_begin_with_home(tmp_path, monkeypatch):
    """bash leaves the ~ of --save=~/a as it is, and a file has no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text("data: {data_path: [0.7, ~/A, 0.3, ~/B], vocab_file: ~/v, merge_file: ~/m, cache_dir: ~}\n")
    typed = ["--config=~/run.yaml", "--save=~/a", "--load", "~/b@best", "--deepspeed-config=~/ds.json"]
    config = parse_run_config([*typed, "--tokenizer-model=~/t"])
    assert config.data.data_path.prefixes == (f"{tmp_path}/A", f"{tmp_path}/B")
    assert (config.data.vocab_file, config.data.merge_file) == (f"{tmp_path}/v", f"{tmp_path}/m")
    assert (config.data.tokenizer_model, config.data.cache_dir) == (f"{tmp_path}/t", None)
    assert (config.checkpoint.save, config.checkpoint.load) == (f"{tmp_path}/a", f"{tmp_path}/b@best")
    assert config.train.deepspeed_config == f"{tmp_path}/ds.json"
    assert parse_run_config(["--data-path=~/A"]).data.data_path.prefixes == (f"{tmp_path}/A",)


def test_a_path_of_any_tool_may_begin_with_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = ArgumentParser()
    parser.add_argument_group("a").add_argument("--out", type=Path)
    parser.add_argument("--load", type=home_expanded)
    given = parser.parse_args(["--out=~/x", "--load=~/y@best"])
    assert (given.out, given.load) == (tmp_path / "x", f"{tmp_path}/y@best")


def test_every_path_of_a_tool_is_one():
    """What is shown as a path is taken as one, so that ~ works everywhere."""
    shown = ("FILE", "DIR", "RUN", "CKPT", "CKPT|RUN", "PATH", "P", "A", "B", "OUT")
    for tool in [*REPOSITORY.glob("tools/*.py"), *REPOSITORY.glob("examples/*.py")]:
        for line in re.findall(r'add(?:_argument)?\(\s*"[^)]*', tool.read_text(encoding="utf-8")):
            if any(f'metavar="{word}"' in line for word in shown):
                assert "type=" in line, f"{tool.name}: {line}"
