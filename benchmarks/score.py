"""Scoring multiple choice beside lm-evaluation-harness's own `hf` backend with the same weights, in turn, in one run.

    python -m benchmarks.score                                every row, some minutes on 2 cores
    python -m benchmarks.score --shapes tiny --contexts 40    some of them
    python -m benchmarks.score --json benchmarks/results/score-here.json

Each question is a context of random token ids, and four answers of 4 to 24. Both are asked the same by ids, so that no
tokenizer plays a part, and must say the same: log-likelihoods to 1e-3, and whether each token is the likeliest.
Needs the extra eval.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.generate import DEVICE, SHAPES, write_model
from benchmarks.machine import conditions
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.evaluate.score import Pair, score
from megagpt.generate.trained import Trained, open_trained

CONTEXTS, ANSWERS, N_ANSWER = (40, 200, 800), 4, (4, 24)
TOKENS = {"tiny": 16_000, "124M": 1_600}  # of contexts in a round, each counted once
Said = list[tuple[float, bool]]


@dataclass(frozen=True)
class Row:
    """One comparison.  ours_s, theirs_s: for all questions, medians; ratio: median of theirs over ours of a round."""

    shape: str
    context: int
    questions: int
    ours_s: float
    theirs_s: float
    ratio: float


def main() -> None:
    """Print the table, and write the JSON."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="tokens before the answers")
    parser.add_argument("--batch", type=int, default=16, help="of the hf backend (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="of each, in turn (default: 3)")
    parser.add_argument("--json", type=Path, help="where the figures go")
    a = parser.parse_args()
    rows: list[Row] = []
    for shape in a.shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_model(replace(SHAPES[shape], seq_len=1024), Path(folder))  # any question fits
            theirs = hf_backend(Path(folder), a.batch)
            with open_trained(folder) as trained:
                for context in a.contexts:
                    rows.append(compare(shape, context, trained, theirs, a.rounds))
                    print(rows[-1], file=sys.stderr, flush=True)
    show(rows)
    if a.json:
        found = conditions("benchmarks.score", DEVICE) | {"rows": [asdict(row) for row in rows]}
        a.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def hf_backend(folder: Path, batch: int) -> Any:
    """The harness's, with a tokenizer that is never asked.  Raises UserError where there is no harness."""
    try:
        from lm_eval.models.huggingface import HFLM  # after the flags: seconds  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"no lm_eval ({error})", "wanted the extra eval", "pip install -e '.[eval]'") from None
    from tokenizers import Tokenizer, models  # likewise
    from transformers import PreTrainedTokenizerFast  # likewise

    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
    return HFLM(pretrained=str(folder), batch_size=batch, device=DEVICE, dtype="float32")


def questions(context: int, n_tokens: int, vocab_size: int) -> list[Pair]:
    """So many that contexts have so many tokens together, by question its answers; the same in every run."""
    draw = random.Random(context)
    pairs: list[Pair] = []
    for _ in range(max(1, n_tokens // context)):
        asked = [draw.randrange(vocab_size) for _ in range(draw.randint(context * 3 // 4, context * 5 // 4))]
        answers = ([draw.randrange(vocab_size) for _ in range(draw.randint(*N_ANSWER))] for _ in range(ANSWERS))
        pairs += [(asked, answer) for answer in answers]
    return pairs


def compare(shape: str, context: int, trained: Trained, theirs: Any, rounds: int) -> Row:
    """Both on the same questions, in turn.  Raises UserError where they differ."""
    pairs = questions(context, TOKENS[shape], trained.config.model.vocab)

    def by_us(pairs: list[Pair]) -> Said:
        return [(one.logprob, one.greedy) for one in score(trained.stage, pairs)]

    def by_hf(pairs: list[Pair]) -> Said:
        return theirs._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)

    times = []
    for some in (pairs[:ANSWERS], *[pairs] * rounds):  # the first question warms up
        (found, ours_s), (expected, theirs_s) = timed(by_us, some), timed(by_hf, some)
        for (logprob, greedy), (other, their_greedy) in zip(found, expected, strict=True):
            if abs(logprob - other) > 1e-3 or greedy != their_greedy:
                raise UserError(f"got log-likelihood {logprob}, {greedy}", f"hf says {other}, {their_greedy}")
        times.append((ours_s, theirs_s))
    ours, theirs_ = (statistics.median(one) for one in zip(*times[1:], strict=True))
    return Row(shape, context, len(pairs) // ANSWERS, ours, theirs_, statistics.median(t / o for o, t in times[1:]))


def timed(once: Callable[[list[Pair]], Said], pairs: list[Pair]) -> tuple[Said, float]:
    """What it says, and the seconds that took."""
    start = time.perf_counter()
    return once(pairs), time.perf_counter() - start


def show(rows: list[Row]) -> None:
    """The table."""
    table = Table(box=SIMPLE_HEAD)
    for title in ("model", "context", "questions", "ours, s", "hf, s", "times as fast"):
        table.add_column(title, justify="right")
    for row in rows:
        times = f"{row.ours_s:.2f}", f"{row.theirs_s:.2f}", f"{row.ratio:.2f}"
        table.add_row(row.shape, str(row.context), str(row.questions), *times)
    Console().print(table)


if __name__ == "__main__":
    run_cli(main)
