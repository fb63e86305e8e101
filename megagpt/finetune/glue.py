"""GLUE's nine tasks, as GPT-1 took them: delimiters, a classifier on the last token, both orders of similar pairs.

No torch. Files are those that GLUE publishes: columns parted by tabs, none of them quoted.
Source: Wang et al. 2018 (GLUE), table 1, for files and metrics; Radford et al. 2018, section 3.3, for inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.errors import UserError
from megagpt.finetune.example import Cuts, Document, Example, Examples
from megagpt.finetune.scores import FIGURES
from megagpt.finetune.task import Classification, Reading, text_of


@dataclass(frozen=True)
class Columns:
    """Where a task's file has what. texts: one sentence, or two. classes: the labels in order; none: a number.

    figures: what it is measured by; their mean is the task's score. symmetric: the order of two texts means nothing.
    header: the columns of a file without a line that names them.
    """

    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    figures: tuple[str, ...] = ("accuracy",)
    symmetric: bool = False
    header: tuple[str, ...] = ()


_TWO, _ENTAILED = ("0", "1"), ("not_entailment", "entailment")
GLUE: dict[str, Columns] = {
    "CoLA": Columns(("sentence",), "label", _TWO, ("matthews",), header=("source", "label", "star", "sentence")),
    "SST-2": Columns(("sentence",), "label", _TWO),
    "MRPC": Columns(("#1 String", "#2 String"), "Quality", _TWO, ("accuracy", "f1"), symmetric=True),
    "QQP": Columns(("question1", "question2"), "is_duplicate", _TWO, ("accuracy", "f1"), symmetric=True),
    "STS-B": Columns(("sentence1", "sentence2"), "score", (), ("pearson", "spearman"), symmetric=True),
    "MNLI": Columns(("sentence1", "sentence2"), "gold_label", ("contradiction", "neutral", "entailment")),
    "QNLI": Columns(("question", "sentence"), "label", _ENTAILED),
    "RTE": Columns(("sentence1", "sentence2"), "label", _ENTAILED),
    "WNLI": Columns(("sentence1", "sentence2"), "label", _TWO),
}
_UNDECIDED = "-"  # MNLI: the annotators did not agree


class Glue(Classification):
    """One of the nine."""

    def __init__(self, name: str) -> None:
        self.name, self.columns = name, GLUE[name]
        self.n_classes = len(self.columns.classes) or 1

    def read(self, path: Path, reading: Reading, *, answered: bool = True) -> Examples:
        """One example a line."""
        text, sha256 = text_of(path, "--train-file, --valid-file and --finetune.test-file")
        lines, n_broken = self._lines(path, text, answered)
        notes = [f"{path}: {n_broken:,} lines have too few columns and are left out"] if n_broken else []
        answers = [self._answer(path, line, label) if answered else None for line, _, label in lines]
        columns = ([texts[i] for _, texts, _ in lines] for i in range(len(self.columns.texts)))
        ids = [reading.tokenizer.encode_batch(column) for column in columns]
        cuts, examples = Cuts(reading.seq_len), []
        for (line, _, _), answer, *texts in zip(lines, answers, *ids, strict=True):
            kept, n_cut = _fitted(texts, self._room(reading))
            cuts.add(line, texts=n_cut)
            orders = [kept, kept[::-1]] if self.columns.symmetric else [kept]
            examples.append(Example(tuple(_document(order, reading.vocab) for order in orders), line, answer))
        if not examples:
            raise UserError(f"{path} holds no example", remedy=f"give GLUE's files of {self.name}")
        return Examples(str(path), examples, [*notes, *cuts.notes(str(path), len(examples))], sha256)

    def figures(self, scores_NC: np.ndarray, examples: Examples) -> Mapping[str, float]:
        """GLUE's, by name."""
        answers_N = np.array([example.answer for example in examples.found])
        found_N = scores_NC[:, 0] if self.n_classes == 1 else scores_NC.argmax(1)
        return {name: FIGURES[name](answers_N, found_N) for name in self.columns.figures}

    def predictions(self, scores_NC: np.ndarray) -> Sequence[str]:
        """Labels by name; numbers with three decimals, within STS-B's 0 to 5."""
        if self.n_classes == 1:
            return [f"{min(5.0, max(0.0, float(score))):.3f}" for score in scores_NC[:, 0]]
        return [self.columns.classes[i] for i in scores_NC.argmax(1)]

    def _room(self, reading: Reading) -> int:
        """Tokens of text in a document: all orders and their delimiters share a row."""
        n_orders, n_delimiters = 1 + self.columns.symmetric, 1 + len(self.columns.texts)
        room = reading.seq_len // n_orders - n_delimiters
        if room < len(self.columns.texts):
            wanted, remedy = f"leaves no room for {self.name} between its delimiters", "give a longer --seq-len"
            raise UserError(f"model.seq_len={reading.seq_len}", wanted, remedy, ["model.seq_len"])
        return room

    def _lines(self, path: Path, text: str, answered: bool) -> tuple[list[tuple[int, list[str], str]], int]:
        """(line, its texts, its label) of each that has all columns, and how many have not."""
        rows = [line.rstrip("\r").split("\t") for line in text.split("\n")]
        named = not self.columns.header or rows[0] == ["index", "sentence"]
        header = rows[0] if named else list(self.columns.header)
        wanted = [*self.columns.texts, *([self.columns.label] if answered else [])]
        if missing := [name for name in wanted if name not in header]:
            shown = ", ".join(header[:12])
            what = f"{path}: has no column {missing[0]!r}, as {self.name} of GLUE has; its first line: {shown}"
            raise UserError(what, remedy="check --task and the file, or get GLUE's own")
        return self._whole(rows, header, wanted, first=1 if named else 0, answered=answered)

    def _whole(
        self, rows: list[list[str]], header: list[str], wanted: list[str], *, first: int, answered: bool
    ) -> tuple[list[tuple[int, list[str], str]], int]:
        places, found, n_broken = [header.index(name) for name in wanted], [], 0
        for line, row in enumerate(rows[first:], first + 1):
            if row == [""]:
                continue
            if len(row) <= max(places):
                n_broken += 1
                continue
            fields = [row[place] for place in places]
            label = fields.pop() if answered else ""
            if label != _UNDECIDED:
                found.append((line, fields, label))
        return found, n_broken

    def _answer(self, path: Path, line: int, label: str) -> float:
        if not self.columns.classes:
            try:
                return float(label)
            except ValueError:
                raise UserError(f"{path}: line {line}: got the score {label!r}", "wanted a number") from None
        if label not in self.columns.classes:
            what = f"{path}: line {line}: got the label {label!r}"
            raise UserError(what, f"wanted one of {', '.join(self.columns.classes)}", "check --task and the file")
        return float(self.columns.classes.index(label))


def _document(texts: Sequence[np.ndarray], vocab: int) -> Document:
    """Start, a text, delimiter, the other one, extract; what is learned beside the answer is the texts' own tokens."""
    start, delimiter, extract = range(vocab, vocab + 3)
    ids = [np.array([start])]
    for i, text in enumerate(texts):
        ids += [text, np.array([extract if i == len(texts) - 1 else delimiter])]
    whole = np.concatenate([*ids, [0]]).astype(np.int32)
    return Document(whole, np.append(whole[1:-1] < vocab, False))


def _fitted(texts: Sequence[np.ndarray], room: int) -> tuple[list[np.ndarray], int]:
    """The beginnings of texts that fit together, the longest ones cut first; and how many tokens that takes away."""
    lengths = [len(text) for text in texts]
    n_cut = max(0, sum(lengths) - room)
    if n_cut and len(texts) == 1:
        lengths = [room]
    elif n_cut:
        shorter = min(min(lengths), room // 2)
        lengths = [shorter, room - shorter] if lengths[0] <= lengths[1] else [room - shorter, shorter]
    return [text[:length] for text, length in zip(texts, lengths, strict=True)], n_cut
