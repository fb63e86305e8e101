"""Tasks beside lm-eval's of the same name: the same prompts, and the same figures of a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megagpt.evaluate.answers import Answers
from megagpt.evaluate.run import run_task
from megagpt.evaluate.tasks import ALL
from megagpt.generate.trained import load_trained
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks

pytest.importorskip("lm_eval", reason="lm_eval is missing, which is heavy: pip install 'megagpt[eval]'")
from tests.evaluate.test_harness import SEQ_LEN, build, write_tokenizer  # which needs it too

pytestmark = pytest.mark.timeout(300)

Docs = tuple[str, list[Any], list[dict[str, Any]]]
"""lm-eval's file of a task; lines of the file that we read; the same documents as its data sets have them."""


def lines(*docs: Any) -> list[Any]:
    return [json.dumps(doc) for doc in docs]


def arc(labels: str, texts: list[str], key: str) -> tuple[dict, dict]:
    stem = "Which is a rock?"
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    ours = {"question": {"stem": stem, "choices": choices}, "answerKey": key}
    theirs = {"question": stem, "choices": {"text": texts, "label": list(labels)}, "answerKey": key}
    return ours, theirs


ARC = [arc("ABCD", ["tin", "granite ", " a cat", "fog"], "B"), arc("123", ["oak", "basalt", "sand dunes"], "3")]
HELLA = [
    {
        "activity_label": "Roof",
        "ctx_a": "A man is on a roof. [header] How to [title] Begin",
        "ctx_b": "he",
        "endings": ["is  using wrap.", "[step] rips tiles. [substeps] Go", "holds.", "starts pulling"],
        "label": 1,
    }
]
WINO = [
    {"sentence": "Ann met Eve so _ left the room.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    {"sentence": "The cup fits not, the _ is big.", "option1": "box", "option2": "cup", "answer": "1"},
]
BOOLQ = [
    {"passage": "Tin is a metal.", "question": "is tin a metal", "label": True},
    {"passage": "It rains.", "question": "is it dry", "label": False},
]
COPA = [
    {"premise": "The man fell. ", "choice1": "It hurt.", "choice2": "He sang.", "question": "effect", "label": 0},
    {"premise": "She slept.", "choice1": "She ran.", "choice2": "Night fell.", "question": "cause", "label": 1},
]
PIQA = [{"goal": "Open a jar.", "sol1": "Turn the lid. ", "sol2": "Eat it."}]
PAIRS = [("It rains.", " It is wet "), ("He ran.", "He sat.")]


def table(heading: str, *rows: str) -> list[str]:
    return [*([heading] if heading else []), *rows]


def pairs(labels: list[str], numbers: list[int], names: tuple[str, str], heading: str, row: str) -> tuple[list, list]:
    """Of a GLUE task: the lines of its file, and the rows of the data set."""
    ours = [row.format(a=a, b=b, label=label) for (a, b), label in zip(PAIRS, labels, strict=True)]
    theirs = [{names[0]: a, names[1]: b, "label": n} for (a, b), n in zip(PAIRS, numbers, strict=True)]
    return table(heading, *ours), theirs


TWO = ("sentence1", "sentence2")
FOLLOWS = (TWO, "index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{label}")
MNLI = (("premise", "hypothesis"), "index\tsentence1\tsentence2\tgold_label", "0\t{a}\t{b}\t{label}")

TASKS: dict[str, Docs] = {
    "arc_easy": ("arc/arc_easy", lines(*(ours for ours, _ in ARC)), [theirs for _, theirs in ARC]),
    "openbookqa": (
        "openbookqa/openbookqa",
        lines(*(ours for ours, _ in ARC)),
        [{**theirs, "question_stem": theirs["question"]} for _, theirs in ARC],
    ),
    "hellaswag": ("hellaswag/hellaswag", lines(*HELLA), [{**doc, "label": str(doc["label"])} for doc in HELLA]),
    "winogrande": ("winogrande/default", lines(*WINO), WINO),
    "boolq": ("super_glue/boolq/default", lines(*BOOLQ), [{**doc, "label": int(doc["label"])} for doc in BOOLQ]),
    "copa": ("super_glue/copa/default", lines(*COPA), COPA),
    "piqa": ("piqa/piqa", lines(*PIQA), [{**doc, "label": 1} for doc in PIQA]),
    "lambada_openai": ("lambada/lambada_openai", lines({"text": "One two\n\nthree"}), [{"text": "One two\n\nthree"}]),
    "cola": ("glue/cola/default", ["gj04\t0\t*\tHe ran it.", "gj04\t1\t\tHe ran."], [
        {"sentence": "He ran it.", "label": 0}, {"sentence": "He ran.", "label": 1}]),
    "sst2": ("glue/sst2/default", table("sentence\tlabel", "a charm . \t1", "dull \t0"), [
        {"sentence": "a charm . ", "label": 1}, {"sentence": "dull ", "label": 0}]),
    "mrpc": ("glue/mrpc/default", *pairs(
        ["1", "0"], [1, 0], TWO, "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t1\t2\t{a}\t{b}")),
    "qqp": ("glue/qqp/default", *pairs(
        ["1", "0"], [1, 0], ("question1", "question2"),
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\t{a}\t{b}\t{label}")),
    "mnli": ("glue/mnli/default", *pairs(["neutral", "contradiction"], [1, 2], *MNLI)),
    "mnli_mismatch": ("glue/mnli/mismatch", *pairs(["entailment", "neutral"], [0, 1], *MNLI)),
    "qnli": ("glue/qnli/default", *pairs(["entailment", "not_entailment"], [0, 1], (
        "question", "sentence"), "index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{label}")),
    "rte": ("glue/rte/default", *pairs(["not_entailment", "entailment"], [1, 0], *FOLLOWS)),
    "wnli": ("glue/wnli/default", *pairs(["1", "0"], [1, 0], *FOLLOWS)),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The files as we read them."""
    root = tmp_path_factory.mktemp("data")
    for name, (_, ours, _) in TASKS.items():
        path = root / ALL[name].files[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(ours) + "\n")
    (root / "piqa/valid-labels.lst").write_text("1\n")
    (root / ALL["cola"].files[1]).write_text("")
    return root


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, Any]:
    """lm-eval's tasks, of files instead of the hub's data sets."""
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    root, made = tmp_path_factory.mktemp("theirs"), {}
    for name, (file, _, rows) in TASKS.items():
        path = root / f"{name}.jsonl"
        path.write_text("\n".join(lines(*rows)) + "\n")
        config = load_yaml(Path(tasks.__file__).parent / f"{file}.yaml", resolve_func=True, recursive=True)
        files = {"data_files": {"test": str(path)}, "cache_dir": str(root / "cache")}
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files, "test_split": "test"}
        for key in ("tag", "training_split", "validation_split", "fewshot_split"):
            config.pop(key, None)
        made[name] = ConfigurableTask(config=config)
    return made


class Asked:
    """Stands for a model: keeps the texts that it is asked for."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    def pair(self, context: str, continuation: str) -> None:
        self.pairs.append((context, continuation))

    def scores(self, pairs: list) -> Any:
        raise StopIteration


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_those_of_lm_eval(name, data, theirs):
    task, asked = ALL[name], Asked()
    docs = task.read([data / file for file in task.files])
    with pytest.raises(StopIteration):
        task.ask(asked, docs, [[]] * len(docs))  # type: ignore[arg-type]
    wanted = []
    for doc in theirs[name].test_docs():
        context = theirs[name].fewshot_context(doc, num_fewshot=0)
        made = theirs[name].construct_requests(doc=doc, ctx=context, metadata=(name, 0, 1))
        wanted += [one.args for one in (made if isinstance(made, list) else [made])]
    assert asked.pairs == wanted


def figures(folder: Path, data: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """On a rank."""
    answers = Answers(load_trained(folder, build_mesh("cpu", pp=1, dp=1, tp=1)))
    return {name: run_task(ALL[name], answers, data).figures for name in names}


def test_figures_are_those_of_the_hf_backend(data, theirs, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    build("gpt2", write_tokenizer(tmp_path, begins=False)).save_pretrained(tmp_path)
    hf = HFLM(pretrained=str(tmp_path), batch_size=2, device="cpu", max_length=SEQ_LEN, dtype="float32")
    wanted = simple_evaluate(hf, tasks=list(theirs.values()), num_fewshot=0, bootstrap_iters=0)["results"]
    (found,) = run_ranks(figures, 1, tmp_path, data, list(TASKS))
    for name, ours in found.items():
        expected = {key.split(",")[0]: value for key, value in wanted[name].items() if key.endswith(",none")}
        expected["ppl"] = expected.get("perplexity", 0.0)
        for figure, value in ours.items():
            assert value == pytest.approx(expected[figure], rel=1e-3), (name, figure)
