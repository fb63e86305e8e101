"""Does `--diagnose` find what is wrong? Tiny models with a planted cause each, and a healthy one beside them.

    python -m benchmarks.diagnose --text openwebtext.jsonl --json benchmarks/results/diagnose-cpu.json

Byte-level models are trained on paragraphs of the text by the public command, some seconds each, and diagnosed on
paragraphs that none of them saw. Of each planted cause the suspicion that comes first must be its own, and strong; the
healthy model must get no strong one. The causes:

| cause | planted |
|---|---|
| rare tokens | the training text lacks digits and capitals, the evaluation has them |
| rare tokens, data gone | likewise, and the training data is not there any more |
| detokeniser | the evaluation text is written as WikiText writes it (" , ", " @-@ ", " 's"), the training text is not |
| separators | training documents do not end with the end of text |
| beyond context | learned positions for 128 tokens, of which training reached 32 |
| bf16 logits | all logits moved by 600, which fp32 does not notice |
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import conditions
from megagpt.config.values import DataPath
from megagpt.console import console_here
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.evaluate.answers import Answers
from megagpt.evaluate.diagnose.diagnose import Findings, diagnose
from megagpt.evaluate.diagnose.show import show_findings
from megagpt.generate.trained import Trained, open_trained

ROOT = Path(__file__).parents[1]
MODEL = ("--n-layers", "2", "--d-model", "64", "--n-heads", "4", "--seq-len", "128", "--model.bias-head")
BATCH = ("--micro-batch-size", "16", "--global-batch-size", "16", "--lr", "3e-3", "--eval-steps", "0")
N_EVALUATION = 160  # paragraphs


def as_it_is(text: str) -> str:
    """Unchanged."""
    return text


def without_digits_and_capitals(text: str) -> str:
    """What a training text lacks."""
    return re.sub(r"\d", "", text).lower()


def as_wikitext(text: str) -> str:
    """Punctuation apart from words, as in WikiText; written without a look at what undoes it."""
    for mark in ("-", ",", "."):
        text = re.sub(rf"(?<=\w){re.escape(mark)}(?=\w)", f" @{mark}@ ", text)
    text = re.sub(r"(\w)('s|'re|'ve|'ll|'t|'d|'m)\b", r"\1 \2", text)
    return re.sub(r" +", " ", re.sub(r"(?<!@)([,.;:!?()])(?!@)", r" \1 ", text)).strip()


def moved_logits(trained: Trained) -> Trained:
    """Another number for the same model: a constant added to all logits."""
    head: Any = trained.stage.layers[-1]
    head.bias.add_(600)
    return trained


def without_data(trained: Trained) -> Trained:
    """As a model from elsewhere."""
    data = replace(trained.config.data, data_path=DataPath(("gone",)))
    return replace(trained, config=replace(trained.config, data=data))


@dataclass(frozen=True)
class Case:
    """A model and a text.  wanted: the kind of suspicion that must come first; None: no strong one.

    trained_on: what is done to training texts; flags: of training; append_eod: whether their ends are marked.
    """

    name: str
    wanted: str | None
    trained_on: Callable[[str], str] = as_it_is
    append_eod: bool = True
    flags: tuple[str, ...] = ()
    evaluated_on: Callable[[str], str] = as_it_is
    precision: str = "fp32"
    change: Callable[[Trained], Trained] = lambda trained: trained

    @property
    def run(self) -> tuple[object, ...]:
        """What makes two cases' trained models the same one."""
        return self.trained_on, self.append_eod, self.flags


CASES = (
    Case("healthy", None),
    Case("healthy in bf16", None, precision="bf16"),
    Case("rare tokens", "tokens", trained_on=without_digits_and_capitals),
    Case("rare tokens, data gone", "tokens", trained_on=without_digits_and_capitals, change=without_data),
    Case("detokeniser", "detokenise", evaluated_on=as_wikitext),
    Case("separators", "ends", append_eod=False),
    Case(
        "beyond context",
        "position",
        flags=("--train.seq-len-start", "32", "--train.seq-len-warmup-steps", "1000000"),
    ),
    Case("bf16 logits", "precision", precision="bf16", change=moved_logits),
)


def main() -> None:
    """Train, diagnose, print and write; exits with an error where a cause is not named first."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with the key text")
    parser.add_argument("--steps", type=int, default=400, help="of training (default: 400)")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--json", type=Path, help="where the findings go")
    parser.add_argument("--runs", type=Path, help="folder to keep trained models in (default: none are kept)")
    a = parser.parse_args()
    lines = a.text.read_text("utf-8").split("\n")
    texts = paragraphs([json.loads(line)["text"] for line in lines if line.strip()])
    cases = [case for case in CASES if not a.cases or case.name in a.cases]
    with tempfile.TemporaryDirectory() as folder:
        found = run_cases(cases, texts, a.runs or Path(folder), a.steps)
    if a.json:
        shown = {case.name: {"wanted": case.wanted} | findings.as_json() for case, findings in found}
        about = conditions("benchmarks.diagnose", "cpu") | {"cases": shown}
        a.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    wrong = [case.name for case, findings in found if first_of(findings) != case.wanted]
    if wrong:
        raise UserError(f"not found: {', '.join(wrong)}", "each planted cause should come first, and be strong")


def first_of(findings: Findings) -> str | None:
    """The kind of what is suspected most, where that is strong."""
    return next((one.kind for one in findings.suspicions if one.strong), None)


def paragraphs(texts: Sequence[str]) -> list[str]:
    """Of 100 to 300 characters, in an order of their own."""
    found = [line.strip() for text in texts for line in text.split("\n") if 100 <= len(line.strip()) <= 300]
    random.Random(0).shuffle(found)
    return found


def run_cases(
    cases: Sequence[Case], texts: Sequence[str], folder: Path, steps: int, n_evaluation: int = N_EVALUATION
) -> list[tuple[Case, Findings]]:
    """By case, what is found; models that cases share are trained once, the first n_evaluation texts left out."""
    runs: dict[object, Path] = {}
    found = []
    for case in cases:
        start = time.perf_counter()
        if case.run not in runs:
            runs[case.run] = train(case, texts[n_evaluation:], folder / f"run-{case.name.replace(' ', '-')}", steps)
        trained_s = time.perf_counter() - start
        with open_trained(runs[case.run], precision=case.precision) as trained, torch.no_grad():
            answers = Answers(case.change(trained))
            findings = diagnose(answers, [case.evaluated_on(text) for text in texts[:n_evaluation]])
        found.append((case, findings))
        print(f"\n=== {case.name}: wanted {case.wanted}, first {first_of(findings)}")
        print(f"trained in {trained_s:.0f} s, diagnosed in {time.perf_counter() - start - trained_s:.0f} s")
        show_findings(console_here(), findings)
    return found


def train(case: Case, texts: Sequence[str], run: Path, steps: int) -> Path:
    """By the public commands.  Raises UserError with what they said where they fail."""
    if run.exists():
        return run
    corpus, prefix = run.with_suffix(".jsonl"), run.with_suffix(".data")
    corpus.write_text("".join(json.dumps({"text": case.trained_on(text)}) + "\n" for text in texts), encoding="utf-8")
    data = ["--input", str(corpus), "--output-prefix", str(prefix), "--tokenizer", "bytes", "--workers", "1"]
    called("tools/preprocess_data.py", *data, *(["--append-eod"] if case.append_eod else []))
    called(
        *("examples/pretrain_gpt.py", "--data-path", f"{prefix}_text_document", "--save", str(run), *MODEL, *BATCH),
        *("--train-steps", str(steps), *case.flags),
    )
    return run


def called(program: str, *arguments: str) -> None:
    """Run a program of this repository."""
    command = [sys.executable, str(ROOT / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{program} ended with {done.returncode}", done.stderr[-500:].strip(), "see what it said")


if __name__ == "__main__":
    run_cli(main)
