"""The command over a small run: tasks of files made here, in one process; what is kept, and what is refused."""

from __future__ import annotations

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagpt.config import DataConfig, RunConfig, plain
from megagpt.errors import UserError
from megagpt.evaluate import answers as answers_module
from megagpt.evaluate.answers import Answers, packed, read_known, unpacked
from megagpt.evaluate.choices import Choices, choose, finish
from megagpt.evaluate.report import shown
from megagpt.evaluate.run import run_task
from megagpt.evaluate.score import Score, score
from megagpt.evaluate.task import Task, json_lines, mean, perplexity
from megagpt.generate.trained import laid_out, load_trained
from tests.checkpoint.written_checkpoint import MODEL, gpt2_tensors, write_checkpoint

PROGRAM = str(Path(__file__).parents[2] / "tools" / "evaluate.py")
PASSAGES = ["a stone lies in the sun", "the sun warms a stone", "who sees the stone", "nobody but the sun"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """Two checkpoints of a GPT-2 over bytes."""
    model = replace(MODEL, vocab_size=257, seq_len=64)
    config = plain(RunConfig(model=model, data=DataConfig(tokenizer="bytes")))
    folder = tmp_path_factory.mktemp("run") / "run"
    for step in (30, 40):
        tensors = {name: 0.05 * values * step / 30 for name, values in gpt2_tensors(model).items()}
        write_checkpoint(folder, step, {"weight": tensors}, config=config)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "lambada").mkdir()
    lines = [json.dumps({"text": passage}) for passage in PASSAGES]
    (folder / "lambada" / "lambada_test.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path):
    """Run it here; returns what it printed."""

    def evaluate(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", str(data), "--out", str(tmp_path / "out"), *flags])
        try:
            runpy.run_path(PROGRAM)["main"]()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return capsys.readouterr().out

    return evaluate


def test_a_task_over_all_checkpoints_of_a_run(command, run: str, tmp_path: Path):
    out = command("--load", f"{run}@all", "--tasks", "lambada_openai", "--json", str(tmp_path / "x.json"), "--records")
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [(row["step"], row["n"], row["task"]) for row in rows] == [
        (30, 4, "lambada_openai"),
        (40, 4, "lambada_openai"),
    ]
    assert shown(rows[0]["figures"]["ppl"]) in out
    assert "whole last word" in out and "gpt2-small 0.3256" in out
    assert rows[0]["figures"]["ppl"] != rows[1]["figures"]["ppl"]
    records = [json.loads(line) for line in (tmp_path / "out" / "run@30" / "lambada_openai.jsonl").open()]
    assert [record["continuation"] for record in records] == [" " + text.split()[-1] for text in PASSAGES]
    loss = -sum(record["logprob"] for record in records) / len(records)
    assert math.exp(loss) == pytest.approx(rows[0]["figures"]["ppl"])
    assert (tmp_path / "out" / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_answered_is_not_asked_again(command, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flags = ("--load", run, "--tasks", "lambada_openai", "--json", str(tmp_path / "x.json"))
    command(*flags, "--limit", "2")
    kept = tmp_path / "out" / "answers.jsonl"
    kept.write_text(kept.read_text() + '{"model": "cut o')  # by a kill
    asked: list[int] = []

    def counted(stage, requests, progress):
        asked.append(len(requests))
        return real(stage, requests, progress)

    real = answers_module.scores_by_slice
    monkeypatch.setattr(answers_module, "scores_by_slice", counted)
    command(*flags)
    whole = json.loads((tmp_path / "x.json").read_text())[0]["figures"]
    command(*flags)
    assert asked == [2, 0] and json.loads((tmp_path / "x.json").read_text())[0]["figures"] == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "lambada_opnai"], "did you mean lambada_openai"),
        (["--tasks", "piqa"], r"piqa needs .*valid.jsonl, .*valid-labels.lst which is not there; get it: Bisk"),
        (["--tasks", "lambada_openai", "--few-shot", "4"], "lambada_openai has 3 examples"),
        (["--tasks", "lambada_openai", "--limit", "0"], "wanted 1 or more"),
    ],
)
def test_refused(command, run: str, flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        command("--load", run, *flags)


def shaped(ask, figures) -> Task:
    """Of documents that `read` gives."""
    return Task(
        name="t", about="", protocol="", source="", files=("a",), ask=ask, figures=figures,
        read=lambda paths: json_lines(paths, "q"),
    )  # fmt: skip


def test_choices_examples_and_normalisation_by_what_whole_texts_score(run: str, tmp_path: Path):
    docs = [{"q": f"{i} is", "a": [" even", " an odd number"], "gold": i % 2} for i in range(6)]
    (tmp_path / "a").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    ask = choose(lambda doc: Choices(tuple((doc["q"], a) for a in doc["a"]), doc["gold"]))
    with laid_out(pp=1, dp=1) as (mesh, _):
        trained = load_trained(run, mesh)
        result = run_task(
            shaped(ask, {"acc": mean("acc"), "acc_norm": mean("acc_norm")}), Answers(trained), tmp_path, shots=2
        )
        for i, record in enumerate(result.records):
            assert record["prompt"].endswith(f"\n\n{i} is") and record["prompt"].count("\n\n") == 2
            assert f"{i} is" not in record["prompt"].removesuffix(f"{i} is")  # no document is its own example
            texts = [record["prompt"] + a for a in record["choices"]]
            n_context = len(record["prompt"].encode())
            pairs = [(list(text.encode())[:n_context], list(text.encode())[n_context:]) for text in texts]
            wanted = [one.logprob for one in score(trained.stage, pairs)]
            assert record["logprobs"] == pytest.approx(wanted, abs=1e-5)
            assert record["acc"] == float((wanted[1] > wanted[0]) == record["gold"])
            assert record["acc_norm"] == float((wanted[1] / 13 > wanted[0] / 4) == record["gold"])
        assert result.figures["acc"] == mean("acc")(result.records) and result.n_cut == 0


def test_prompts_that_are_cut_are_counted_and_blanks_go_with_what_follows(run: str, tmp_path: Path):
    (tmp_path / "a").write_text(json.dumps({"q": "x" * 200}) + "\n" + json.dumps({"q": "short "}) + "\n")
    with laid_out(pp=1, dp=1) as (mesh, _):
        answers = Answers(load_trained(run, mesh))
        result = run_task(shaped(finish(lambda doc: (doc["q"], "end")), {"ppl": perplexity()}), answers, tmp_path)
        assert result.n_cut == 1 and [record["n_tokens"] for record in result.records] == [3, 4]
        assert answers.pair("", "a") == ((256,), [97]) and answers.pair("a ", "b") == ((97,), [32, 98])


def test_a_tokenizer_of_another_vocabulary_is_told(tmp_path: Path):
    model = replace(MODEL, vocab_size=100, seq_len=64)
    config = plain(RunConfig(model=model, data=DataConfig(tokenizer="bytes")))
    write_checkpoint(tmp_path / "run", 1, {"weight": gpt2_tensors(model)}, config=config)
    with laid_out(pp=1, dp=1) as (mesh, _), pytest.raises(UserError, match="gives token id 117 wanted 0 to 99"):
        Answers(load_trained(tmp_path / "run", mesh)).scores([([1], [117])])


def test_what_is_kept_comes_back_and_strange_lines_are_told(tmp_path: Path):
    one = Score(*(torch.tensor(values).numpy() for values in ([-1.5, -0.25], [-1.0, -0.25], [False, True])))
    back = unpacked(json.loads(json.dumps(packed(one))))
    assert (back.logprobs == one.logprobs).all() and (back.best == one.best).all() and (back.hits == one.hits).all()
    (tmp_path / "answers.jsonl").write_text('{"model": "m", "k": 1}\n{"model": "other", "k": 2}\nno\n{"model": "m"}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl:3 is no answer"):
        read_known(tmp_path / "answers.jsonl", "m")


def test_diagnose_tells_what_is_suspected_and_writes_it(command, run: str, tmp_path: Path):
    out = command("--load", run, "--tasks", "lambada_openai", "--diagnose")
    found = json.loads((tmp_path / "out" / "run-diagnosis.json").read_text())
    assert "nats per token over" in out and found["n_documents"] == len(PASSAGES)
    assert found["suspicions"][0]["claim"][:30] in out  # an untrained model has something to be suspected of
