"""CORE's prompts, what is scored of them, and its mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagpt.errors import UserError
from megagpt.evaluate.run import files_of, run_task
from megagpt.evaluate.score import Score
from megagpt.evaluate.tasks import ALL
from megagpt.evaluate.tasks.core import Part, centred, parts

CHOICE = {"query": "Sky?", "choices": ["blue", "black"], "gold": 0}
SCHEMA = {"context_options": ["The cup", "The box"], "continuation": "is big.", "gold": 1}
TEXT = {"context": " 1 + 1 = ", "continuation": "2"}


class Letters:
    """A tokenizer: a letter, a token."""

    encode = staticmethod(lambda text: tuple(map(ord, text)))


class Model:
    """Finds each token as likely as its number is small; keeps what it is asked for, in letters."""

    tokenizer, empty, n_cut = Letters(), (0,), 0

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def scores(self, pairs: list[Any]) -> list[Score]:
        self.asked += [("".join(map(chr, a)), "".join(map(chr, b))) for a, b in pairs]
        values = [-np.array(ids, dtype=np.float32) for _, ids in pairs]
        return [Score(value, value, value > -100) for value in values]


def asked(part: Part, docs: list, shots: list) -> tuple[list[tuple[str, str]], list]:
    model = Model()
    records = part.ask(model, docs, shots)  # type: ignore[arg-type]
    return model.asked, records


def test_choices_are_scored_from_where_they_differ():
    part = Part(name="a", kind="choice", file="a", delimiter="\nAnswer: ")
    pairs, (record,) = asked(part, [CHOICE], [[CHOICE]])
    before = "\0Sky?\nAnswer: blue\n\nSky?\nAnswer: bl"
    assert pairs == [(before, "ue"), (before, "ack")]
    assert record["logprobs"] == [-(117 + 101) / 2, -(97 + 99 + 107) / 3]  # means: a sum would prefer "ue"
    assert record["choice"] == 1 and record["acc"] == 0


def test_a_schema_is_scored_by_the_end_that_all_share():
    part = Part(name="a", kind="schema", file="a")
    pairs, (record,) = asked(part, [SCHEMA], [[SCHEMA]])
    assert pairs == [("\0The box is big.\n\nThe cup", " is big."), ("\0The box is big.\n\nThe box", " is big.")]
    assert record["gold"] == 1


def test_a_text_is_to_be_written():
    part = Part(name="a", kind="text", file="a")
    pairs, records = asked(part, [TEXT, {"context": "x", "continuation": "~"}], [[TEXT], []])
    assert pairs == [("\0" + "1 + 1 = 2\n\n1 + 1 =", " 2"), ("\0x", " ~")]
    assert [record["acc"] for record in records] == [1, 0]


def test_a_choice_that_another_begins_with_keeps_a_token():
    pairs, _ = asked(Part(name="a", kind="choice", file="a"), [{**CHOICE, "choices": ["red", "reddish"]}], [[]])
    assert pairs == [("\0Sky? re", "d"), ("\0Sky? re", "ddish")]


def test_centred():
    assert centred(0.62)([{"acc": 1.0}, {"acc": 0.0}]) == pytest.approx(-0.12 / 0.38)
    assert len(parts()) == 22 and sum(part.shots for part in parts()) == 10 * 14 + 3


def test_the_mean_is_over_the_parts_whose_files_are_there(tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match="none is there"):
        files_of(ALL["core"], tmp_path)
    monkeypatch.setattr("megagpt.evaluate.run.together", lambda made: made())
    (tmp_path / "icl").mkdir()
    for name, doc in (("winograd_wsc", SCHEMA), ("lambada_openai", TEXT), ("copa", CHOICE)):
        (tmp_path / f"icl/{name}.jsonl").write_text(json.dumps(doc) + "\n")
    result = run_task(ALL["core"], Model(), tmp_path)  # type: ignore[arg-type]
    assert result.figures["core_copa"] == -1 and result.figures["core_lambada_openai"] == 1
    assert result.figures["core"] == pytest.approx(sum(list(result.figures.values())[1:]) / 3)
    assert result.n == 3 and "without core_hellaswag_zeroshot, core_jeopardy" in result.task.protocol
