"""The commands of README, CONTRIBUTING, docs and of each --help do what they say: cheap ones are run, a training's are
planned on as many processes as they start, the others' arguments parsed.

Found by themselves: what stands in a code block and begins with a program, and spans like `make test`. Where a command
is not run, one of the tables below says why; a program that is in none of them fails the test.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed.run
from deepspeed.launcher import runner
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import megagpt.cli
from megagpt.errors import UserError
from megagpt.plan.plan import make_plan

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
PROGRAMS = [*ROOT.glob("tools/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py"),
            *ROOT.glob("*/*/__main__.py"), ROOT / "megagpt/cli/flags.py"]  # fmt: skip
STARTS = (
    "python ",
    "deepspeed ",
    "torchrun ",
    "make ",
    "cd ",
    "sha256sum ",
    "source ",
    "tensorboard ",
    "ssh ",
    "kill ",
)

RUN = {
    "tools/plan.py", "tools/plot_run.py", "tools/checkpoint.py", "tools/average_checkpoints.py", "tools/factorize.py",
    "tools/preprocess_data.py", "tools/inspect_data.py", "examples/generate.py", "examples/evaluate.py",
}  # fmt: skip
PARSED = {  # program or module: why its arguments are parsed only
    "examples/pretrain_gpt.py": "trains for minutes: planned; a short run of it makes the runs that the others read",
    "examples/finetune_gpt.py": "trains on files that are not in this repository: planned; tests/finetune runs it",
    "tools/finetuned.py": "reads runs that were fine-tuned; tests/tools runs it",
    "examples/serve.py": "runs until a signal; tests/serve asks it",
    "tools/plan_check.py": "reads tables that are not in this repository; tests/plan runs it on small ones",
    "tools/calibrate.py": "measures machines; tests/processes/preflight asks its rates",
    "tools/preflight.py": "measures machines; tests/processes/preflight runs it",
    "tools/parity.py": "walks for minutes; tests/parity runs it",
    "tools/config_reference.py": "writes a page of this checkout; tests/tools compare it",
    "tools/models_page.py": "writes a page of this checkout; tests/tools compare it",
    "tools/tasks_page.py": "writes a page of this checkout; tests/tools compare it",
    "megagpt.ops": "writes into this checkout; tests/tools/test_new_op.py lays an op in a copy",
    "tools/evaluate.py": "reads files of tasks, which are not in this repository; tests/evaluate runs it",
    "tests": "tests of their own, and soaks of hours",
    "megagpt.evaluate.harness": "the harness's own arguments; tests/evaluate asks its methods",
    "benchmarks": "minutes to hours; tests/benchmarks runs what it can",
}
PARSED_HERE = {  # one command, though others of its program are run
    "--as mistral": "runs/a is a GPT-2, which no mistral computes",
    "--fine-tune-steps": "500 steps",
    "--gpus": "a search of some seconds; tests/plan searches for smaller models",
    "--load runs/2": "the run that make train has just made, named by the date",
}
LEFT_OUT = {  # what a command begins with: why nothing is asked of it
    "source .venv/bin/activate": "the shell's own",
    "tensorboard": "a server, of another project",
    "ssh ": "another machine",
    "kill ": "a process of the reader's own",
    "python setup.py": "make build, which builds what these tests use",
    "python -m pip": "installs",
    "ruff ": "another project's",
    "pyright ": "another project's",
}
PLACEHOLDERS = {"RUN": "runs/a", "RUN/checkpoints/step-000100": "runs/a/checkpoints/step-000100"}
SHOWN = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```", re.MULTILINE | re.DOTALL)  # a program of the page itself
FORMS = re.compile(r" …|\b(FLAGS|NAME|HOST|PID|N|M|X|Y)\b|\[")  # a form to fill in, where it is no argument of ours


@dataclass(frozen=True)
class Command:
    """words: as a shell would split them. block: it stands in a code block, whole, and not within a sentence."""

    place: str
    words: list[str]
    block: bool


def commands_of(page: str) -> Iterator[Command]:
    """The commands of a page, in its order."""
    fenced, joined = False, ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        place = f"{page}:{number}"
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    ") or joined:
            joined += line.strip()
            if joined.endswith("\\"):
                joined = joined[:-1]
                continue
            text, joined = re.split(r" {4,}(?=\w)| +# ", joined)[0], ""
            for part in text.removeprefix("$ ").split(" && "):
                if part.startswith(STARTS):
                    yield Command(place, [PLACEHOLDERS.get(w, w) for w in shlex.split(part)], block=True)
        else:
            for span in re.findall(r"`([^`]+)`", line):
                names = span.startswith("make ") or ".py" in span or " -m " in span
                if span.startswith(STARTS) and names and not FORMS.search(span):
                    yield Command(place, shlex.split(span), block=False)


def commands_of_help(file: Path) -> Iterator[Command]:
    """The commands of a program's first docstring and of its DESCRIPTION, which --help shows."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    texts = [ast.get_docstring(tree) or ""]
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts.append(node.value.value)
    for text in texts:
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            words = re.split(r" {3,}(?=\S)| +# ", line.strip())[0]
            if line.strip().startswith(STARTS):
                yield Command(str(file.relative_to(ROOT)), shlex.split(words), block="tools/plan.py" in words)


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_commands_of_each_help(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run.yaml").write_text("optim: {lr: 0.001}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tools")
    found = [c for c in commands_of_help(file) if "runs/b/config.yaml" not in c.words]  # what factorize has written
    failed = [f"{c.place}: {shlex.join(c.words)}\n    {wrong}" for c in found if (wrong := problem(c, tmp_path))]
    assert not failed, "\n".join(failed)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(page: str, sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = list(commands_of(page))
    here = tmp_path / "here"
    if any(command.block for command in found):
        shutil.copytree(sandbox, here)
        for name, source in SHOWN.findall((ROOT / page).read_text(encoding="utf-8")):
            (here / name).write_text(source)
        monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(ROOT / "tools")
    failed = [f"{c.place}: {shlex.join(c.words)}\n    {wrong}" for c in found if (wrong := problem(c, here))]
    assert not failed, "\n".join(failed)


def test_there_are_commands():
    found = [command for page in PAGES for command in commands_of(page)]
    assert sum(command.block and command.words[0] == "python" for command in found) > 20
    for wrong in ("python tools/plan.py --preset gpt5", "python tools/plot_run.py", "make no-such-target",
                  "deepspeed x.py", "torchrun --procs 2 examples/pretrain_gpt.py",
                  "deepspeed examples/pretrain_gpt.py --tp 8",
                  "deepspeed examples/pretrain_gpt.py --preset gpt2-xl --tp 2",
                  "torchrun --nproc-per-node 3 examples/pretrain_gpt.py --tp 2",
                  "python examples/pretrain_gpt.py --tpp 2", "python tools/parity.py --layout tp=2",
                  "python tools/new_tool.py", "python -m tests.soak --kills 3",
                  'make plan ARGS="--tpp 2"'):  # fmt: skip
        assert problem(Command("", shlex.split(wrong), block=False), ROOT), wrong


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/operations.md"])
def test_files_that_a_page_names_exist(page: str):
    """As `megagpt/…`, `tests/…` and the like; NAME is the reader's own. operations.md has a test of its own."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:megagpt|tests|tools|docs|benchmarks|examples|csrc)/[\w/.-]+)`", text)
    named += [f"megagpt/{path}" for path in re.findall(r"`((?:model|train|optim|inventory|processes)/[\w/.]+)`", text)]
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


def problem(command: Command, here: Path) -> str | None:
    """What is wrong with a command; None where it ran, or its arguments are right."""
    words = command.words
    if words[:3] == ["python", "-m", "pytest"]:
        lost = [word for word in words if word.startswith("tests/") and not (ROOT / word.split("::")[0]).exists()]
        return f"there is no {', '.join(lost)}" if lost else None
    if shlex.join(words).startswith(tuple(LEFT_OUT)):
        return None
    match words[0]:
        case "cd":
            os.chdir(here / words[1])
            return None
        case "sha256sum":
            done = subprocess.run(words, capture_output=True, text=True)
            os.chdir(here)
            return done.stdout + done.stderr if done.returncode else None
        case "make":
            return made(command, here)
        case "deepspeed":
            parsed = runner.parse_args([word for word in words[1:] if word != "…"])
            return program([parsed.user_script, *parsed.user_args], run=False)  # on as many as the layout needs
        case "torchrun":
            launcher, script = (
                torch.distributed.run.get_args_parser(),
                words.index(next(w for w in words if ".py" in w or w == "-m")),
            )
            parsed: list[argparse.Namespace] = []
            problem = quietly(lambda: parsed.append(launcher.parse_args([w for w in words[1:] if w != "…"])))
            if problem:
                return problem
            hosts, local = parsed[0].nnodes.split(":")[-1], parsed[0].nproc_per_node
            world_size = int(hosts) * int(local) if "…" not in words[:script] else 0
            return program(words[script:], run=False, world_size=world_size)
        case _:
            return program(words[1:], run=command.block and not any(part in shlex.join(words) for part in PARSED_HERE))


def made(command: Command, here: Path) -> str | None:
    """A target of make: its recipe, as make writes it, command by command."""
    flags = ["-s", "-C", str(ROOT), "-n", "-o", ".venv/.ready", "PYTHON=python3"]
    done = subprocess.run(["make", *flags, *command.words[1:]], capture_output=True, text=True)
    if done.returncode:
        return done.stderr
    for line in done.stdout.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace(".venv/bin/", ""), comments=True)
        ours = words and words[0] in ("python", "deepspeed")
        if ours and (wrong := problem(Command(command.place, words, command.block), here)):
            return wrong
    return None


def planned(arguments: list[str], world_size: int) -> None:
    """A training's command: its plan on so many processes; 0: on the fewest."""
    config = megagpt.cli.parse_run_config(arguments)
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 1)
    make_plan(dataclasses.replace(config, model=model), world_size or config.parallel.tp * config.parallel.pp)


def program(words: list[str], run: bool, world_size: int = 0) -> str | None:
    """Run one of our programs, or parse its arguments. world_size: processes that its launcher starts; 0: unknown."""
    module = words[0] == "-m"
    name, *arguments = words[1:] if module else words
    arguments = [word for word in arguments if word not in ("FLAGS", "…")]
    why = PARSED.get(name, PARSED.get(re.split(r"[./]", name)[0]))
    if run and not module and Path(name).is_file():  # of the page itself; it may leave anything behind
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run([sys.executable, name, *arguments], env=environment, capture_output=True, text=True)
        return done.stderr[-500:] if done.returncode else None
    if name not in RUN and why is None:
        return f"{name} is in no table of {Path(__file__).name}; give it a place"
    if not module and not (ROOT / name).is_file():
        return f"there is no {name}"
    if name in ("examples/pretrain_gpt.py", "examples/finetune_gpt.py"):
        return quietly(lambda: planned(arguments, world_size))
    target = name if module else str(ROOT / name)
    if name in RUN and run and "--help" not in arguments:
        return quietly(lambda: called(target, module, arguments))
    if module and ".parse_args(" not in source_of(name):
        return None  # it takes what it is given
    if "--" in arguments:  # what follows is for the training
        wrong = quietly(lambda: megagpt.cli.parse_run_config(arguments[arguments.index("--") + 1 :]))
        if wrong:
            return wrong
    with pytest.MonkeyPatch.context() as patch:
        parsed_only(patch)
        return quietly(lambda: called(target, module, arguments))


def source_of(module: str) -> str:
    """Of a module that `python -m` runs."""
    file = ROOT.joinpath(*module.split("."))
    return (file / "__main__.py" if file.is_dir() else file.with_suffix(".py")).read_text(encoding="utf-8")


def called(target: str, module: bool, arguments: list[str]) -> None:
    """The program, in this process: torch is loaded already."""
    kept_argv, kept_signals = sys.argv, {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    sys.argv = [target, *arguments]
    try:
        runpy.run_module(target, run_name="__main__", alter_sys=True) if module else runpy.run_path(
            target, None, "__main__"
        )
    finally:
        sys.argv = kept_argv
        for number, handler in kept_signals.items():
            signal.signal(number, handler)


class Parsed(Exception):  # noqa: N818  # the good end
    """All arguments are known."""


def parsed_only(patch: pytest.MonkeyPatch) -> None:
    """From now on a program ends where its arguments have been parsed."""
    parse_args, parse_run_config = argparse.ArgumentParser.parse_args, megagpt.cli.parse_run_config

    def parse(parser, *arguments, **named):
        parse_args(parser, *arguments, **named)
        raise Parsed

    def parse_config(*arguments, **named):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            parse_run_config(*arguments, **named)
        raise Parsed

    patch.setattr(argparse.ArgumentParser, "parse_args", parse)
    patch.setattr(megagpt.cli, "parse_run_config", parse_config)


def quietly(call) -> str | None:
    """What a call complains of."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            call()
        except Parsed:
            return None
        except SystemExit as end:
            return f"exit code {end.code}: {said.getvalue()[-500:]}" if end.code else None
        except UserError as error:
            return str(error)
    return None


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: a corpus, files of a tokenizer, and a finished run, runs/a, with runs/other; and
    adapters on it, runs/lora.
    """
    folder = tmp_path_factory.mktemp("sandbox")
    texts = [path.read_text(encoding="utf-8")[:2000] for path in sorted(Path(__file__).parent.glob("*.py"))] * 4
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "data").mkdir()
    (folder / "run.yaml").write_text("optim: {lr: 0.001}\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model.save(str(folder))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    tiny = (
        "--n-layers 1 --d-model 32 --n-heads 2 --seq-len 16 --global-batch-size 8 --eval-steps 1 --eval-interval 50 "
        "--train-steps 100 --warmup-steps 1 --save-interval 25 --optim.ema-decay 0.9 --save runs/a"
    )
    for line in (
        "tools/preprocess_data.py --input corpus.jsonl --output-prefix my --tokenizer gpt2 --vocab-file vocab.json "
        "--merge-file merges.txt --append-eod --workers 1",
        f"examples/pretrain_gpt.py --data-path {folder}/my_text_document {tiny}",
        "examples/pretrain_gpt.py --load runs/a --config runs/a/config.yaml --lora.rank 2 --save runs/lora "
        "--train-steps 2",
    ):
        program, *words = shlex.split(line)
        done = subprocess.run(
            [sys.executable, str(ROOT / program), *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "runs" / "a", folder / "runs" / "other")
    return folder
