"""Tasks whose answers a model writes, and how they are judged: exact match, F1, ROUGE, BLEU."""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megagpt.errors import UserError
from megagpt.evaluate.answers import Answers
from megagpt.evaluate.choices import Ask
from megagpt.evaluate.task import Doc, Figure, Record
from megagpt.generate.request import Sampling

PUNCTUATION = str.maketrans("", "", string.punctuation)


def greedy(n_tokens: int, *stop: str, bias: Mapping[int, float] | None = None) -> Sampling:
    """The likeliest token each time, after the bias, up to one of the strings."""
    return Sampling(n_tokens=n_tokens, temperature=0.0, top_k=0, stop=stop, logit_bias=bias or {})


def write(
    made: Callable[[Doc], tuple[str, str]],
    judge: Callable[[Doc, str], Record],
    sampling: Sampling,
    *,
    begin: str = "",
    between: str = "\n\n",
) -> Ask:
    """Ask for a text.

    made: (document) -> prompt; and the answer that follows it where the document is an example before another.
    judge: (document, what was written) -> numbers.  begin: stands before all; between: after each example.
    Records: prompt, written, and what judge finds.
    """

    def ask(answers: Answers, docs: Sequence[Doc], shots: Sequence[Sequence[Doc]]) -> list[Record]:
        examples = ["".join("".join(made(shot)) + between for shot in some) for some in shots]
        prompts = [begin + some + made(doc)[0] for doc, some in zip(docs, examples, strict=True)]
        ids = [answers.trained.bounds.begun(answers.tokenizer.encode(prompt)) for prompt in prompts]
        texts = answers.texts(ids, sampling)
        return [
            {"prompt": prompt, "written": text, **judge(doc, text)}
            for doc, prompt, text in zip(docs, prompts, texts, strict=True)
        ]

    return ask


def exact(text: str, golds: Sequence[str]) -> float:
    """1 where the text is one of golds; case, punctuation and articles before a blank aside, as lm-eval's nq_open."""
    return float(_plain(text.strip()) in map(_plain, golds))


def _plain(text: str) -> str:
    return re.sub(r"\b(?:The |the |An |A |a |an )", "", text).lower().translate(PUNCTUATION)


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as SQuAD's script takes them (Rajpurkar et al. 2016)."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def overlap(text: str, gold: str) -> float:
    """F1 of the words; of texts without any: 1 where both are so."""
    found, wanted = words(text), words(gold)
    if not found or not wanted:
        return float(found == wanted)
    n = sum((Counter(found) & Counter(wanted)).values())
    return 2 * n / (len(found) + len(wanted))


def over_annotators(measure: Callable[[str, str], float], text: str, golds: Sequence[str]) -> float:
    """The mean, leaving out one annotator's answer at a time, of the best over the others' (Reddy et al. 2019)."""
    if len(golds) == 1:
        return measure(text, golds[0])
    found = [measure(text, gold) for gold in golds]
    return sum(max(found[:i] + found[i + 1 :]) for i in range(len(found))) / len(found)


def rouge(text: str, gold: str) -> Record:
    """F1 of ROUGE-1, -2 and -L (Lin 2004), with stems, as the package rouge-score has it."""
    scorer = _extra("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rouge1", "rouge2", "rougeL"], True)
    return {name: score.fmeasure for name, score in scorer.score(gold, text).items()}


def bleu(written: str, gold: str) -> Figure:
    """Of all texts together, 0 to 100, with sacrebleu's own tokenisation 13a (Post 2018)."""
    return lambda records: (
        _extra("sacrebleu", "sacrebleu").corpus_bleu([r[written] for r in records], [[r[gold] for r in records]]).score
    )


def _extra(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)  # a second, and the extra eval
    except ImportError as error:
        raise UserError(
            f"this task needs {package} ({error})", "which the extra eval brings", "pip install 'megagpt[eval]'"
        ) from None
