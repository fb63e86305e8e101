"""Each detector on losses that are made up; the whole on tiny models with planted causes."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from megagpt.config import ModelConfig, RunConfig
from megagpt.data.tokenizers.bytes import ByteTokenizer
from megagpt.evaluate.answers import Answers
from megagpt.evaluate.diagnose.calibration import calibration
from megagpt.evaluate.diagnose.classes import classes
from megagpt.evaluate.diagnose.detokenise import detokenise, detokenised, tokenised
from megagpt.evaluate.diagnose.diagnose import DETECTORS, Findings, diagnose
from megagpt.evaluate.diagnose.ends import ends
from megagpt.evaluate.diagnose.evidence import Case, Detector, Suspicion
from megagpt.evaluate.diagnose.losses import losses
from megagpt.evaluate.diagnose.position import position
from megagpt.evaluate.diagnose.precision import precision
from megagpt.evaluate.diagnose.reading import LOST, read
from megagpt.evaluate.diagnose.show import show_findings
from megagpt.evaluate.diagnose.tokens import tokens
from megagpt.evaluate.diagnose.untrained import untrained
from megagpt.evaluate.score import Pair, Score
from megagpt.generate.stage import build_stage
from megagpt.generate.trained import Trained
from megagpt.inventory.layers import TIED
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks

TEXTS = [f"The {word} said, on the {n}th day, it's a well-known tale." for n, word in enumerate("abcdefghij")]
HEALTHY = 1.5  # nats: less than any token's share of the texts says, but for the most frequent ones
END = 256
Loss = Callable[[tuple[int, ...], int], float]


@dataclass
class Made:
    """In place of `Answers`: a loss for each token, by the tokens of the window before it and itself."""

    loss: Loss
    seq_len: int = 64
    said: float = 0.5
    right: float = 0.5
    empty: tuple[int, ...] = (END,)
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    trained: Any = field(
        default_factory=lambda: SimpleNamespace(stage=SimpleNamespace(weight=torch.zeros(1, dtype=torch.float32)))
    )

    def scores(self, pairs: Sequence[Pair]) -> list[Score]:
        random_ = np.random.default_rng(0)
        found = []
        for context, continuation in pairs:
            whole = (*context, *continuation)
            made = [self.loss(whole[:i], whole[i]) for i in range(len(context), len(whole))]
            best = np.full(len(made), np.log(self.said))
            found.append(Score(-np.array(made), best, random_.random(len(made)) < self.right))
        return found


def case_of(made: Made, counts_V: np.ndarray | None = None) -> Case:
    ids_D = [[*made.tokenizer.encode(text), END] for text in TEXTS]
    return Case(made, TEXTS, ids_D, read(made, ids_D), counts_V)  # pyright: ignore[reportArgumentType]


def counted(lacking: str = "") -> np.ndarray:
    """Tokens of a training text like TEXTS, without some characters."""
    ids = [i for text in TEXTS for i in (*text.encode(), END) if chr(i) not in lacking]
    return np.bincount(ids, minlength=257)


def healthy(before: tuple[int, ...], token: int) -> float:
    return HEALTHY


def strange_end(before: tuple[int, ...], token: int) -> float:
    return 20.0 if token == END else HEALTHY


def strange_beginning(before: tuple[int, ...], token: int) -> float:
    return 4.0 if before[0] == END and len(before) <= 32 else HEALTHY


def apart(before: tuple[int, ...], token: int) -> float:
    """Of a model that saw punctuation stand alone."""
    return 9.0 if token == ord(",") and before[-1] != ord(" ") else HEALTHY


def overflowing(before: tuple[int, ...], token: int) -> float:
    return np.inf if token == ord("w") else HEALTHY


@pytest.mark.parametrize(
    ("detector", "made", "lacking", "kind", "evidence"),
    [
        (losses, Made(lambda before, token: 9.0), "", "texts", "10 of 10 documents"),
        (tokens, Made(lambda before, token: 12.0 if token == ord("T") else HEALTHY), "T", "tokens", "the most: 'T'"),
        (position, Made(lambda before, token: HEALTHY if len(before) <= 16 else 5.0), "", "position", "16: 1.500"),
        (classes, Made(lambda before, token: 12.0 if chr(token).isdigit() else HEALTHY), "", "classes", "12.00 nats"),
        (calibration, Made(healthy, said=0.9, right=0.2), "", "calibration", "said: 90.0%"),
        (ends, Made(strange_end), "", "ends", "has probability 2.1e-09"),
        (ends, Made(strange_beginning), "", "ends", "2.500 nats a token less after nothing"),
        (detokenise, Made(apart), "", "detokenise", "The a said , on"),
        (precision, Made(overflowing), "", "precision", "not finite"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_detector_names_its_cause_and_no_other_speaks_louder(
    detector: Detector, made: Made, lacking: str, kind: str, evidence: str
):
    found = suspicions(case_of(made, counted(lacking)))
    assert found[0].kind == kind and found[0].strong
    (own,) = (one for one in detector(case_of(made, counted(lacking))).suspicions if one.strong)
    assert own == found[0] and evidence in " ".join(own.evidence)
    assert not any(one.strong for one in suspicions(case_of(Made(healthy), counted())))


def test_tokens_that_look_untrained_are_named_where_the_data_is_gone():
    made = Made(lambda before, token: 12.0 if token == ord("T") else HEALTHY)
    case = case_of(made)
    assert not tokens(case).suspicions and "not known" in tokens(case).title
    (found,) = tokens(replace(case, untrained=np.arange(257) == ord("T"))).suspicions
    assert found.strong and found.evidence[1].endswith("the most: 'T'")


def rows_apart(like: str, pp: int, tp: int) -> np.ndarray | None:
    """On a rank: which tokens look untrained, where those of `like` are as those that no text gives; none: nothing."""
    model = ModelConfig(n_layers=2, d_model=8, n_heads=2, seq_len=8, vocab_size=257)
    stage = build_stage(model, build_mesh("cpu", pp=pp, dp=1, tp=tp))
    draw = torch.Generator().manual_seed(0)
    rows_VD = torch.randn(257, 8, generator=draw)
    if like:
        alike = [*range(128, 256), *like.encode()]
        rows_VD[alike] = 1.0 + 0.01 * torch.randn(len(alike), 8, generator=draw)
    for named in stage.canonical_parameters():
        if named.name == TIED:
            named.part.unpadded(named.parameter.data).copy_(named.part.take(rows_VD))
    return untrained(Answers(Trained(stage, RunConfig(model=model), ByteTokenizer(), Path(), 0)))


@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (2, 1), (1, 2)])
def test_untrained_tokens_are_told_by_their_rows(pp: int, tp: int):
    for found in run_ranks(rows_apart, pp * tp, "xQ", pp, tp):
        assert found is not None and [*np.flatnonzero(found)] == [*sorted(b"xQ"), *range(128, 256)]
    assert run_ranks(rows_apart, 1, "", 1, 1) == [None]


def suspicions(case: Case) -> list[Suspicion]:
    return Findings(0, 0, 0, tuple(detect(case) for detect in DETECTORS)).suspicions


def test_nats_are_those_that_would_be_gone():
    made = Made(lambda before, token: HEALTHY if len(before) <= 16 else 5.0)
    case = case_of(made)
    (found,) = position(case).suspicions
    assert found.nats == pytest.approx(case.reading.loss - HEALTHY)
    lost = case_of(Made(overflowing))
    n_lost = sum(text.count("w") for text in TEXTS)
    assert lost.reading.n_lost == n_lost
    assert precision(lost).suspicions[0].nats == pytest.approx(n_lost * LOST / len(lost.reading.ids))


def test_forms_are_told_apart():
    wikitext = " = Title = \n The 1 @,@ 000 well @-@ known ( old ) kings ' days , it 's said ; \" so \" .\n"
    assert detokenised(wikitext) == "Title\nThe 1,000 well-known (old) kings ' days, it's said; \"so\".\n"
    assert tokenised("It's 1,000, well-known (old).") == "It 's 1 @,@ 000 , well @-@ known ( old ) ."
    for text in TEXTS:
        assert detokenised(tokenised(text)) == text == detokenised(text)


def rounded_logits(shown: bool) -> tuple[list[Suspicion], str]:
    """On a rank: of a model in bf16 whose logits are all moved, which fp32 would not notice."""
    model = ModelConfig(n_layers=1, d_model=32, n_heads=2, seq_len=32, vocab_size=257, bias_head=True, init_std=0.3)
    stage = build_stage(model, build_mesh("cpu", pp=1, dp=1, tp=1)).to(torch.bfloat16)
    stage.layers[-1].bias.add_(600)  # pyright: ignore[reportCallIssue, reportArgumentType, reportAttributeAccessIssue]
    trained = Trained(stage, RunConfig(model=model), ByteTokenizer(), Path(), 0)
    findings, out = diagnose(Answers(trained), TEXTS), io.StringIO()
    assert stage.weight.dtype == torch.bfloat16 and findings.as_json()["n_documents"] == len(TEXTS)
    show_findings(Console(file=out, width=80), findings)
    return [one for one in findings.suspicions if one.kind == "precision"], out.getvalue()


def test_bf16_is_read_again_in_fp32_and_told_in_80_columns():
    (((found,), shown),) = run_ranks(rounded_logits, 1, True)
    assert found.strong and "float32 with the same weights" in found.evidence[0]
    assert "tokens seen in training: not known" in shown and "--precision fp32" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_planted_causes_come_first(tmp_path: Path):
    from benchmarks.diagnose import CASES, first_of, run_cases  # a program, with what it needs

    # The healthy ones are the benchmark's: after so few steps this small one is unsure of itself, and rightly told so.
    planted = [case for case in CASES if case.wanted]
    for case, findings in run_cases(planted, sentences(2500), tmp_path, steps=200, n_evaluation=100):
        assert (case.name, first_of(findings)) == (case.name, case.wanted)


def sentences(n: int) -> list[str]:
    """Two or three each, of few words: small models learn them in seconds."""
    draw, found = random.Random(0), []
    names, verbs = ("Anna", "Bob", "Old Clara", "Dan's dog"), ("saw", "lost", "found", "well-nigh forgot")
    things = ("the boat", "a house", "12 coins", "3,400 ships", "its tail", "a half-open door")
    for _ in range(n):
        parts = [
            f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)}, {draw.choice(('and', 'but'))} "
            f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)} in {draw.randint(1900, 1999)}."
            for _ in range(draw.randint(2, 3))
        ]
        found.append(" ".join(parts))
    return found
