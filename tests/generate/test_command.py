"""The command and the function, on a run of ours with a tokenizer."""

from __future__ import annotations

import io
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from megagpt.config import DataConfig, RunConfig, plain
from megagpt.errors import UserError
from megagpt.generate import Sampling, generate
from tests.checkpoint.written_checkpoint import MODEL, gpt2_tensors, write_checkpoint

PROGRAM = str(Path(__file__).parents[2] / "examples" / "generate.py")


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> str:
    model = replace(MODEL, vocab_size=257, seq_len=64)
    config = plain(RunConfig(model=model, data=DataConfig(tokenizer="bytes")))
    run = tmp_path_factory.mktemp("run") / "run"
    write_checkpoint(run, 30, {"weight": gpt2_tensors(model)}, config=config)
    return str(run)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], load: str):
    """Run it here; returns what it printed, and what it said beside that."""

    def run(*flags: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", "--load", load, *flags])
        try:
            runpy.run_path(PROGRAM)["main"]()
        finally:
            if dist.is_initialized():  # by a program that was refused, which would end here
                dist.destroy_process_group()
        return capsys.readouterr()

    return run


def test_one_prompt_is_printed_as_it_is_written_with_what_is_said_beside_it(command):
    out, err = command("--prompt", "def ", "--n-tokens", "12", "--seed", "4")
    assert out.startswith("def ") and out.endswith("\n") and out == command(*["--n-tokens", "12", "--seed", "4"])[0]
    assert "step-000030, 30 steps" in err and out != command("--n-tokens", "12", "--seed", "5")[0]
    out, err = command("--n-tokens", "100")
    assert "the context of 64 tokens is full; --slide goes on" in err
    assert "is full" not in command("--n-tokens", "100", "--slide")[1]


def test_a_file_of_prompts_gives_a_json_line_a_text_in_its_order(command, tmp_path: Path, load: str):
    file = tmp_path / "prompts.txt"
    file.write_text(
        'plain words\n\n[13, 14, 15]\n{"prompt": "in an object"}\n"quo\u2028ted"\n{"other": 1}\n[true]\n', "utf-8"
    )
    flags = ["--prompts", str(file), "--json", "--n-tokens", "5", "--n-samples", "2", "--logprobs", "2", "--batch", "3"]
    out, err = command(*flags, "--prompt-logprobs")
    lines = [json.loads(line) for line in out.split("\n") if line]
    prompts = ["plain words", [13, 14, 15], "in an object", "quo\u2028ted", '{"other": 1}', "[true]"]
    assert [(line["prompt"], line["sample"]) for line in lines] == [(p, i) for p in prompts for i in range(2)]
    assert all(len(line["tokens"]) == len(line["logprobs"]) == 5 and line["finish"] == "length" for line in lines)
    assert len(lines[2]["prompt_logprobs"]) == 3 and len(lines[0]["logprobs"][0]["likeliest"]) == 2
    assert "cache: 3 texts of 17 tokens" in err
    texts = generate(load, prompts, Sampling(n_tokens=5, n_samples=2))
    assert [text.tokens for samples in texts for text in samples] == [line["tokens"] for line in lines]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: cannot be read as text"),
        (["--batch", "0", "--json"], "got n_rows=0 for the cache wanted 1 or more"),
        (["--logprobs", "1"], "got --logprobs or --prompt-logprobs which only --json prints"),
        (["--logit-bias", "x"], "--logit-bias got 'x' wanted ID=X"),
        (["--prompt", "a\udcff"], r"got the prompt 'a\\udcff' wanted whole characters"),
        (["--prompt-ids", "300"], r"got token id \[300\] in prompt wanted 0 to 256"),
        (["--top-p", "2"], "got top_p=2.0 wanted above 0, at most 1"),
        (["--pp", "2"], "got 1 processes for --pp 2 --dp 1 wanted a multiple of 2"),
        (["--prompt", "x" * 70], "got a prompt of 70 tokens wanted at most 64, the model's context"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(command, flags, message):
    with pytest.raises(UserError, match=message):
        command(*flags)


def test_lines_that_are_typed_are_answered_one_that_cannot_be_too(command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"def f\n\n{'x' * 70}\nclass A"))
    out, err = command("--interactive", "--n-tokens", "3")
    assert [line[:5] for line in out.splitlines() if line[:5] in ("def f", "class")] == ["def f", "class"]
    assert "error: got a prompt of 70 tokens" in err and "x" * 70 not in out


def test_lines_that_are_typed_are_answered_in_json(command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f\n"))
    out, _ = command("--interactive", "--n-tokens", "3", "--json", "--n-samples", "2")
    assert [json.loads(line)["prompt"] for line in out.splitlines() if line] == ["def f", "def f"]


def test_a_json_line_has_its_tokens_where_there_are_none(command):
    out, _ = command("--json", "--n-tokens", "0")
    assert json.loads(out.strip())["tokens"] == []
