"""Does pretraining help? A small model pretrained on real text and fine-tuned, beside the same model from scratch.

    python -m benchmarks.finetune --text wiki.txt owt.jsonl --work DIR --sst2 SST-2/train.tsv SST-2/dev.tsv \\
        --cola CoLA/train.tsv CoLA/dev.tsv --json benchmarks/results/finetune-cpu.json

Both have one architecture, tokenizer, recipe, data order and number of steps, and differ in the first weights alone;
the rate of each is the best of --rates by one seed that is not counted. What is in --work already is not done again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer

from benchmarks.machine import conditions
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.finetune.result import read_result
from megagpt.finetune.start import finetune
from megagpt.processes.local import warm_up

ROOT = Path(__file__).parents[1]
VOCAB, SEQ_LEN = 2048, 64
MODEL = ["--n-layers", "2", "--d-model", "96", "--n-heads", "4", "--seq-len", str(SEQ_LEN)]
PRETRAIN = ["--lr", "3e-3", "--warmup-steps", "100", "--global-batch-size", "64", "--micro-batch-size", "64"]
FINETUNE = ["--global-batch-size", "16", "--micro-batch-size", "16", "--log-interval", "50"]
FINETUNE += [f"--model.dropout-{where}=0" for where in ("embedding", "attention", "residual")]  # little is learned
EVERY = ["--eval-interval", "1000", "--save-interval", "1000"]  # judged at the end alone
TRIAL = 99  # the seed by which a rate is chosen
LINES = 40  # of plain text in a document


@dataclass(frozen=True)
class Arm:
    """One way to begin, on one task. scores: of each seed, as GLUE has them, at the end."""

    task: str
    pretrained: bool
    rate: str
    scores: list[float]
    mean: float
    spread: float


def main() -> None:
    """Print the table, and write the JSON."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="plain text, or JSON lines with a text key")
    parser.add_argument("--work", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--sst2", type=Path, nargs=2, metavar=("TRAIN", "DEV"), help="files of SST-2")
    parser.add_argument("--cola", type=Path, nargs=2, metavar=("TRAIN", "DEV"), help="files of CoLA")
    parser.add_argument("--examples", type=int, default=8000, help="first lines to train on (default: 8000)")
    parser.add_argument("--seeds", type=int, default=5, help="of each (default: 5)")
    parser.add_argument("--steps", type=int, default=600, help="of pretraining (default: 600)")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning (default: 1)")
    parser.add_argument("--rates", nargs="+", default=["1e-3"], help="to choose from, for each")
    parser.add_argument("--json", type=Path, help="where the figures go")
    a = parser.parse_args()
    tasks = [(name, files) for name, files in (("SST-2", a.sst2), ("CoLA", a.cola)) if files]
    if not tasks:
        raise UserError("no task is given", remedy="name files: --sst2 TRAIN DEV, --cola TRAIN DEV")
    a.work.mkdir(parents=True, exist_ok=True)
    base = pretrained(a.text, a.work, a.steps)
    arms = []
    for name, (train, dev) in tasks:
        data = first_lines(train, a.work / f"{name}.tsv", a.examples), dev
        for is_pretrained in (True, False):
            arms.append(arm(name, data, base, is_pretrained, a.work, a.rates, a.epochs, a.seeds))
            print(arms[-1], flush=True)
    if a.json:
        losses = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
        about = {
            "model": MODEL, "pretrained_on": [path.name for path in a.text], "pretraining_steps": a.steps,
            "pretraining_validation": [row for row in losses if "validation_loss" in row][-1],
            "examples": a.examples, "epochs": a.epochs,
        }  # fmt: skip
        found = conditions("benchmarks.finetune", "cpu") | about | {"arms": [asdict(one) for one in arms]}
        a.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def pretrained(texts: Sequence[Path], work: Path, steps: int) -> Path:
    """The run of a small model on these texts, by a tokenizer of their own."""
    corpus, prefix = work / "corpus.jsonl", work / "corpus"
    if not corpus.exists():
        with corpus.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for path in texts for text in documents(path))
    if not (work / "bpe.model").exists():
        sentences = (json.loads(line)["text"] for line in corpus.open(encoding="utf-8"))
        with (work / "bpe.model").open("wb") as model:
            SentencePieceTrainer.train(
                sentence_iterator=sentences, model_writer=model, vocab_size=VOCAB, model_type="bpe",
                byte_fallback=True, max_sentence_length=1 << 20, input_sentence_size=20_000, minloglevel=2,
            )  # fmt: skip
    if not (work / "corpus_text_document.idx").exists():
        program("tools/preprocess_data.py", "--input", corpus, "--output-prefix", prefix, "--tokenizer",
                "sentencepiece", "--tokenizer-model", work / "bpe.model", "--append-eod")  # fmt: skip
    program("examples/pretrain_gpt.py", *MODEL, *PRETRAIN, "--data-path", f"{prefix}_text_document",
            "--train-steps", steps, "--save", work / "base", "--auto-resume", "--log-interval", 100,
            "--eval-interval", 500, "--save-interval", 500, "--seed", 1)  # fmt: skip
    return work / "base"


def documents(path: Path) -> Iterator[str]:
    """The texts of JSON lines; of plain text, so many lines each."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        yield from (json.loads(line)["text"] for line in lines)
    else:
        yield from ("\n".join(lines[i : i + LINES]) for i in range(0, len(lines), LINES))


def first_lines(source: Path, out: Path, n: int) -> Path:
    """A file of the first n examples of another one."""
    lines = source.read_text(encoding="utf-8").split("\n")
    out.write_text("\n".join(lines[: n + 1]) + "\n", encoding="utf-8")
    return out


def arm(
    task: str, data: tuple[Path, Path], base: Path, is_pretrained: bool, work: Path, rates: Sequence[str], epochs: int,
    n_seeds: int,
) -> Arm:  # fmt: skip
    """Choose the rate, and score every seed with it."""
    name = f"{task}-{'pretrained' if is_pretrained else 'scratch'}"

    def score(rate: str, seed: int) -> float:
        run = work / f"{name}-{rate}-{seed}"
        weights = "--finetune.weights" if is_pretrained else "--finetune.no-weights"
        files = ["--train-file", data[0], "--valid-file", data[1], "--save", run, "--auto-resume"]
        settings = [*FINETUNE, *EVERY, "--epochs", epochs, "--lr", rate, "--seed", seed, weights]
        forked("--task", task, "--base", base, *files, *settings)
        result = read_result(run)
        assert result is not None
        return float(result["score"])

    best = max(rates, key=lambda rate: score(rate, TRIAL)) if len(rates) > 1 else rates[0]
    scores = [score(best, seed) for seed in range(1, n_seeds + 1)]
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return Arm(task, is_pretrained, best, scores, statistics.mean(scores), spread)


def program(path: str, *arguments: Any) -> None:
    """Run one of ours."""
    subprocess.run([sys.executable, str(ROOT / path), *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def forked(*arguments: Any) -> None:
    """Run examples/finetune_gpt.py in a fork of a process that has torch: each would take seconds to load it."""
    warm_up()
    start = time.perf_counter()
    process = multiprocessing.get_context("forkserver").Process(target=_finetune, args=([*map(str, arguments)],))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"examples/finetune_gpt.py {' '.join(map(str, arguments))} ended with {process.exitcode}")
    print(f"{arguments[9]}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def _finetune(argv: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    finetune(argv)


if __name__ == "__main__":
    run_cli(main)
