"""Measures of what is written, on values worked out by hand and beside their libraries; and prompts that ask for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megagpt.errors import UserError
from megagpt.evaluate.figures import f1, matthews
from megagpt.evaluate.tasks import ALL
from megagpt.evaluate.tasks.cbt import question
from megagpt.evaluate.tasks.summaries import beginning
from megagpt.evaluate.writing import bleu, exact, over_annotators, overlap, rouge, words


class Writer:
    """Writes what it is told to; keeps prompts, a letter a token."""

    def __init__(self, *texts: str) -> None:
        self.written, self.prompts = list(texts), []
        self.tokenizer = SimpleNamespace(encode=lambda text: text)
        self.trained = SimpleNamespace(bounds=SimpleNamespace(begun=lambda ids: ids))

    def texts(self, prompts: list[Any], sampling: Any) -> list[str]:
        self.prompts, self.sampling = prompts, sampling
        return self.written


def put(name: str, docs: list, shots: list, *texts: str) -> tuple[Writer, list]:
    writer = Writer(*texts)
    return writer, ALL[name].ask(writer, docs, shots)  # type: ignore[arg-type]


def test_words_and_their_overlap():
    assert words("The  cat's a Cat, an owl.") == ["cats", "cat", "owl"]
    assert overlap("a black cat", "the cat sat") == pytest.approx(2 * (1 / 2) * (1 / 2) / (1 / 2 + 1 / 2))
    assert overlap("cat cat", "cat") == pytest.approx(2 / 3)
    assert overlap("the", "") == 1 and overlap("", "cat") == 0


def test_each_annotator_is_left_out_once():
    assert over_annotators(overlap, "cat", ["cat"]) == 1
    assert over_annotators(overlap, "cat", ["cat", "dog", "owl"]) == pytest.approx(2 / 3)


def test_exact_match_is_lm_evals():
    assert exact(" the Beatles!", ["Beatles"]) == 1 and exact("Beatle", ["Beatles"]) == 0
    assert exact("1969", ["1968", "1969"]) == 1


def test_correlation_and_f1_of_classes():
    records = [{"gold": g, "choice": c} for g, c in [(1, 1), (1, 1), (1, 0), (0, 1), (0, 0), (0, 0)]]
    assert matthews("gold", "choice")(records) == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert f1("gold", "choice")(records) == pytest.approx(4 / 6)
    constant = [{"gold": g, "choice": 0} for g in (0, 1)]
    assert matthews("gold", "choice")(constant) == f1("gold", "choice")(constant) == 0


def test_rouge_is_the_packages():
    pytest.importorskip("rouge_score", reason="rouge-score is missing: pip install 'megagpt[eval]'")
    found = rouge("the cat sat", "the cats ran off")  # by stems cat = cats
    assert found["rouge1"] == pytest.approx(2 * 2 / 7) and found["rouge2"] == pytest.approx(2 * 1 / 5)


def test_bleu_is_sacrebleus():
    pytest.importorskip("sacrebleu", reason="sacrebleu is missing: pip install 'megagpt[eval]'")
    records = [{"a": "the cat sat on the mat .", "b": "the cat sat on a mat ."}]
    by_hand = 100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert bleu("a", "b")(records) == pytest.approx(by_hand, rel=1e-6)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"sacrebleu(.|\n)*megagpt\[eval\]"):
        bleu("a", "b")([{"a": "x", "b": "x"}])


def test_natural_questions():
    doc, shot = {"question": "who", "answer": ["Al"]}, {"question": "where", "answer": ["Rome", "Roma"]}
    writer, (record,) = put("nq_open", [doc], [[shot]], " al")
    assert writer.prompts == ["Answer these questions:\n\nQ: where?\nA: Rome\nQ: who?\nA:"]
    assert record["em"] == 1 and writer.sampling.temperature == 0 and writer.sampling.stop == ("\n", ".", ",")


def test_coqa_asks_after_all_that_was_said(tmp_path: Path):
    turns = [{"input_text": text} for text in ("Who?", "Why?")]
    answers = [[{"input_text": text} for text in some] for some in (("Ann", "rain"), ("A", "wet"), ("Ann", "Rain"))]
    dialogue = {"story": "S.", "questions": turns, "answers": answers[0]}
    dialogue["additional_answers"] = dict(zip("01", answers[1:], strict=True))
    (tmp_path / "dev.json").write_text(json.dumps({"data": [dialogue]}))
    every = ALL["coqa_gpt2"].read([tmp_path / "dev.json"])
    (last,) = ALL["coqa"].read([tmp_path / "dev.json"])
    assert every[0]["prompt"] == "S.\n\nQ: Who?\n\nA:" and last["golds"] == ["rain", "wet"]
    writer, (record,) = put("coqa", [last], [[]], " Rain\nQ")
    assert writer.prompts == ["S.\n\nQ: Who?\n\nA: Ann\n\nQ: Why?\n\nA:"]
    assert record["f1"] == record["em"] == 0.5
    (tmp_path / "dev.json").write_text('{"data": [{}]}')
    with pytest.raises(UserError, match="wanted CoQA's dialogues"):
        ALL["coqa"].read([tmp_path / "dev.json"])


def test_translations_follow_pairs():
    docs = [{"source": "Yes", "gold": "Oui"}, {"source": "No", "gold": "Non"}]
    writer, (record,) = put("wmt14_en_fr", docs[:1], [docs[1:]], " Oui ")
    assert writer.prompts == ["No = Non\nYes ="] and record["translation"] == "Oui"


def test_a_summary_is_three_sentences():
    assert beginning("One. Two!\nThree\nFour.") == "One. Two! Three"


def test_a_left_out_word_is_scored_with_the_rest_of_its_sentence():
    doc = {"before": ["Hi , Ann .", "`` Go ! ''"], "sentence": "`` XXXXX is n't in .", "choices": ["Ann"], "gold": 0}
    assert question(doc).options == (('Hi, Ann. "Go!" "', "Ann isn't in."),)
    doc["sentence"] = "XXXXX is in ."
    assert question(doc).options == (('Hi, Ann. "Go!"', " Ann is in."),)
