"""GLUE without training: sentences, and pairs of them, that are put into a class (Wang et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megagpt.errors import UserError
from megagpt.evaluate.choices import Choices, choose
from megagpt.evaluate.figures import f1, matthews
from megagpt.evaluate.task import Doc, Figure, Task, mean, text_of

COLA = ("source", "label", "star", "sentence")  # of its files, which have no heading


def table(columns: Sequence[str], names: Sequence[str] = ()) -> Callable[[Sequence[Path]], list[Doc]]:
    """Reads tab-separated lines, without quotes.  columns: that must be there; names: of a file without a heading."""

    def read(paths: Sequence[Path]) -> list[Doc]:
        found = []
        for path in paths:
            rows = [line.rstrip("\r").split("\t") for line in text_of(path).lstrip("\ufeff").split("\n") if line]
            heading = list(names) or rows[0]
            lacks = [name for name in columns if name not in heading]
            if lacks:
                raise UserError(f"{path} has no column {lacks[0]}", f"wanted {', '.join(columns)}", "get the file anew")
            for i, row in enumerate(rows if names else rows[1:], 1 if names else 2):
                if len(row) != len(heading):
                    raise UserError(f"{path}:{i} has {len(row)} fields", f"wanted {len(heading)}", "get the file anew")
                found.append(dict(zip(heading, row, strict=True)))
        return found

    return read


def _task(
    name: str,
    about: str,
    folder: str,
    prompt: Callable[[Doc], str],
    columns: Sequence[str],
    *,
    example: str,
    answers: Mapping[str, str],
    figures: Mapping[str, Figure] | None = None,
    parts: Sequence[str] = ("dev", "train"),
    names: Sequence[str] = (),
    source: str = "",
) -> Task:
    """One of them.  answers: what the model writes for each label of the file; columns: the label last;
    parts: files, the training file last.  example: of the first file.
    """
    labels = list(answers)

    def question(doc: Doc) -> Choices:
        label = doc[columns[-1]]
        if label not in labels:
            raise UserError(f"{folder} has the label {label!r}", f"wanted {', '.join(labels)}", "get the file anew")
        return Choices(tuple((prompt(doc), " " + text) for text in answers.values()), labels.index(label))

    return Task(
        name=name,
        about=about,
        protocol="likeliest answer; as lm-eval's task of this name",
        source=source or f"Wang et al. 2018; GLUE's {folder}.zip",
        files=tuple(f"glue/{folder}/{part}.tsv" for part in parts[:-1]),
        example=(example, *[""] * (len(parts) - 2)),
        training=(f"glue/{folder}/{parts[-1]}.tsv",),
        read=table(columns, names),
        ask=choose(question),
        figures=figures or {"acc": mean("acc")},
    )


def _with_stop(text: str) -> str:
    text = text.strip()
    return text if text.endswith(".") else text + "."


def _mnli(doc: Doc) -> str:
    return f"{doc['sentence1']}\nQuestion: {_with_stop(doc['sentence2'])} True, False or Neither?\nAnswer:"


def _follows(doc: Doc) -> str:
    return f"{doc['sentence1']}\nQuestion: {doc['sentence2']} True or False?\nAnswer:"


NO_YES = {"0": "no", "1": "yes"}
MNLI = {"entailment": "True", "neutral": "Neither", "contradiction": "False"}
PAIR = ("sentence1", "sentence2")

TASKS = (
    _task(
        "cola",
        "whether a sentence is well formed",
        "CoLA",
        lambda doc: f"{doc['sentence']}\nQuestion: Does this sentence make sense?\nAnswer:",
        ("sentence", "label"),
        example="gj04\t1\t\tThe road was closed.\n",
        answers=NO_YES,
        figures={"mcc": matthews("gold", "choice")},
        parts=("in_domain_dev", "out_of_domain_dev", "in_domain_train"),  # which are GLUE's dev and train
        names=COLA,
        source="Warstadt et al. 2018; the authors' cola_public_1.1.zip, its folder raw",
    ),
    _task(
        "sst2",
        "whether a sentence praises a film",
        "SST-2",
        lambda doc: f"{doc['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ("sentence", "label"),
        example="sentence\tlabel\na quiet , lovely film \t1\n",
        answers={"0": "negative", "1": "positive"},
    ),
    _task(
        "mrpc",
        "whether two sentences say the same",
        "MRPC",
        lambda doc: (
            f"Sentence 1: {doc['#1 String']}\nSentence 2: {doc['#2 String']}\n"
            "Question: Do both sentences mean the same thing?\nAnswer:"
        ),
        ("#1 String", "#2 String", "Quality"),
        example="Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tRoads are closed .\tThe roads were shut .\n",
        answers=NO_YES,
        figures={"acc": mean("acc"), "f1": f1("gold", "choice")},
    ),
    _task(
        "qqp",
        "whether two questions ask the same",
        "QQP",
        lambda doc: (
            f"Question 1: {doc['question1']}\nQuestion 2: {doc['question2']}\n"
            "Question: Do both questions ask the same thing?\nAnswer:"
        ),
        ("question1", "question2", "is_duplicate"),
        example="id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tHow old is Ann?\tWhat is Ann's age?\t1\n",
        answers=NO_YES,
        figures={"acc": mean("acc"), "f1": f1("gold", "choice")},
    ),
    *(
        _task(
            name,
            "what follows",
            "MNLI",
            _mnli,
            (*PAIR, "gold_label"),
            example="index\tsentence1\tsentence2\tgold_label\n0\tAnn fed the hens.\tThe hens ate\tneutral\n",
            answers=MNLI,
            parts=(part, "train"),
        )
        for name, part in (("mnli", "dev_matched"), ("mnli_mismatch", "dev_mismatched"))
    ),
    _task(
        "qnli",
        "whether a sentence answers a question",
        "QNLI",
        lambda doc: f"{doc['question']}\n{doc['sentence']}\nQuestion: Does this response answer the question?\nAnswer:",
        ("question", "sentence", "label"),
        example="index\tquestion\tsentence\tlabel\n0\tWho fed the hens?\tAnn fed them.\tentailment\n",
        answers={"entailment": "yes", "not_entailment": "no"},
    ),
    _task(
        "rte",
        "whether a sentence follows",
        "RTE",
        _follows,
        (*PAIR, "label"),
        example="index\tsentence1\tsentence2\tlabel\n0\tAnn fed the hens.\tThe hens ate.\tentailment\n",
        answers={"entailment": "True", "not_entailment": "False"},
    ),
    _task(
        "wnli",
        "whether a pronoun is resolved rightly",
        "WNLI",
        _follows,
        (*PAIR, "label"),
        example="index\tsentence1\tsentence2\tlabel\n0\tThe cup is not in the box: it is big.\tIt is big.\t1\n",
        answers={"0": "False", "1": "True"},
    ),
)
