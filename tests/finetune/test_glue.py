"""GLUE's nine tasks from files of their published form: inputs, answers, metrics, predictions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megagpt.config import FinetuneConfig
from megagpt.errors import UserError
from megagpt.finetune.example import Example, Examples
from megagpt.finetune.glue import GLUE, Glue
from tests.finetune.examples import READING, write_glue

START, DELIMITER, EXTRACT = 257, 258, 259


def words(ids: np.ndarray) -> str:
    names = {START: "<s>", DELIMITER: "<d>", EXTRACT: "<e>"}
    return "".join(names.get(int(i), chr(int(i))) for i in ids[:-1])


def test_the_settings_offer_them_all():
    for name in GLUE:
        assert FinetuneConfig(task=name).task == name  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", GLUE)
def test_each_is_read_from_its_columns(tmp_path, name):
    task, columns = Glue(name), GLUE[name]
    read = task.read(write_glue(tmp_path / "train.tsv", name), READING)
    assert len(read.found) == 12 and not read.notes and len(read.sha256) == 64
    wanted = [float(i % len(columns.classes)) if columns.classes else float(i % 6) for i in range(12)]
    assert [example.answer for example in read.found] == wanted
    first = read.found[0]
    assert len(first.documents) == 1 + (name in ("MRPC", "QQP", "STS-B"))
    text = "good 0 " if len(columns.texts) == 1 else "good 0 <d>good 1 "
    assert words(first.documents[0].ids) == f"<s>{text}<e>"
    if columns.symmetric:
        assert words(first.documents[1].ids) == "<s>good 1 <d>good 0 <e>"
    # The text's own tokens are learned beside the answer; what stands around it is not.
    learned = first.documents[0].ids[1:][first.documents[0].counts]
    assert learned.max() < 257 and len(learned) == len(text.replace("<d>", ""))


def test_a_file_to_predict_needs_no_answers(tmp_path):
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tfine\n")
    for name in ("CoLA", "SST-2"):
        (example,) = Glue(name).read(tmp_path / "test.tsv", READING, answered=False).found
        assert example.answer is None and words(example.documents[0].ids) == "<s>fine<e>"


def test_lines_without_all_columns_and_undecided_ones_are_left_out(tmp_path):
    lines = ["sentence1\tsentence2\tgold_label", "a\tb\tneutral", "a\tb\t-", "broken", "a\tb\tentailment"]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    read = Glue("MNLI").read(tmp_path / "a.tsv", READING)
    assert [example.line for example in read.found] == [2, 5]
    assert read.notes == [f"{tmp_path / 'a.tsv'}: 1 lines have too few columns and are left out"]


def test_quotes_are_text(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"so" it goes\t1\n')
    (example,) = Glue("SST-2").read(tmp_path / "a.tsv", READING).found
    assert words(example.documents[0].ids) == '<s>"so" it goes<e>'


@pytest.mark.parametrize(
    ("task", "text", "said"),
    [
        ("SST-2", "text\tlabel\na\t1\n", "has no column 'sentence', as SST-2 of GLUE has; its first line: text, label"),
        ("SST-2", "sentence\tlabel\na\t2\n", "line 2: got the label '2' wanted one of 0, 1"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\thigh\n", "line 2: got the score 'high' wanted a number"),
        ("RTE", "sentence1\tsentence2\tlabel\n", "holds no example"),
    ],
)
def test_what_is_no_file_of_the_task_is_told(tmp_path, task, text, said):
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(UserError) as caught:
        Glue(task).read(tmp_path / "a.tsv", READING)
    assert said in str(caught.value)


def test_of_two_texts_the_longer_one_is_cut_first(tmp_path):
    (tmp_path / "a.tsv").write_text(f"sentence1\tsentence2\tlabel\n{'a' * 60}\tbbb\tentailment\n")
    read = Glue("RTE").read(tmp_path / "a.tsv", READING)
    assert words(read.found[0].documents[0].ids) == f"<s>{'a' * 42}<d>bbb<e>"  # 48 in all
    assert "18 tokens of texts are cut" in read.notes[0]
    (tmp_path / "b.tsv").write_text(f"#1 String\t#2 String\tQuality\n{'a' * 60}\t{'b' * 60}\t1\n")
    example = Glue("MRPC").read(tmp_path / "b.tsv", READING).found[0]
    assert words(example.documents[0].ids) == f"<s>{'a' * 11}<d>{'b' * 10}<e>" or example.n_tokens == 48
    with pytest.raises(UserError, match="leaves no room for MRPC"):
        Glue("MRPC").read(tmp_path / "b.tsv", replace(READING, seq_len=8))


def answered(answers: list[float]) -> Examples:
    return Examples("none", [Example((), 1, answer) for answer in answers])


def test_figures_are_those_of_the_definitions():
    """By hand: 3 true and 2 false positives, 1 false and 2 true negatives."""
    answers, given = [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0]
    scores_NC = np.eye(2)[given]
    found = Glue("MRPC").figures(scores_NC, answered(list(map(float, answers))))
    assert found == pytest.approx({"accuracy": 5 / 8, "f1": 2 * 3 / (2 * 3 + 2 + 1)})
    found = Glue("CoLA").figures(scores_NC, answered(list(map(float, answers))))
    assert found == pytest.approx({"matthews": (3 * 2 - 2 * 1) / (5 * 4 * 4 * 3) ** 0.5})
    scores_N1 = np.array([[1.0], [2.0], [4.0], [3.0]])
    found = Glue("STS-B").figures(scores_N1, answered([0.0, 1.0, 2.0, 3.0]))
    assert found == pytest.approx({"pearson": 0.8, "spearman": 0.8})
    assert Glue("STS-B").figures(np.ones((4, 1)), answered([0.0, 1.0, 2.0, 3.0])) == {"pearson": 0.0, "spearman": 0.0}


def test_predictions_are_written_as_the_files_have_labels():
    assert Glue("RTE").predictions(np.array([[0.2, 0.1], [0.0, 3.0]])) == ["not_entailment", "entailment"]
    assert Glue("STS-B").predictions(np.array([[5.7], [-1.0], [2.5]])) == ["5.000", "0.000", "2.500"]
