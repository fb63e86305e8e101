"""Tasks with given answers: which does a model find the likeliest, and does it write the one that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megagpt.evaluate.answers import Answers
from megagpt.evaluate.task import Doc, Record

Ask = Callable[[Answers, Sequence[Doc], Sequence[Sequence[Doc]]], list[Record]]


@dataclass(frozen=True)
class Choices:
    """A question: by choice, the context and what follows it; and which of them is right.

    Of most tasks contexts are equal and continuations differ; of schemas it is the other way round.
    """

    options: tuple[tuple[str, str], ...]
    gold: int

    def told(self, begin: str) -> Record:
        """For the user to read: prompt, and choices; contexts, which stand between them, where each choice has its own.

        begin: stands before all.
        """
        contexts, choices = zip(*self.options, strict=True)
        if len({*contexts}) == 1:
            return {"prompt": begin + contexts[0], "choices": list(choices)}
        return {"prompt": begin, "contexts": list(contexts), "choices": list(choices)}

    @property
    def shown(self) -> str:
        """As an example before another question: with the right answer."""
        return "".join(self.options[self.gold])


def choose(made: Callable[[Doc], Choices], *, between: str = "\n\n") -> Ask:
    """Ask for the likeliest of the choices.

    Records: acc: whether it is the right one by the sum of its log-probabilities; acc_norm: by the sum over its length
    in characters, as lm-eval does: without the blank before it; acc_token: by the mean over its tokens.  choice: the
    likeliest.
    between: stands after each example.
    """

    def ask(answers: Answers, docs: Sequence[Doc], shots: Sequence[Sequence[Doc]]) -> list[Record]:
        asked = [made(doc) for doc in docs]
        before = ["".join(made(shot).shown + between for shot in some) for some in shots]
        pairs = [
            answers.pair(begin + context, continuation)
            for one, begin in zip(asked, before, strict=True)
            for context, continuation in one.options
        ]
        scores = iter(answers.scores(pairs))
        records = []
        for one, begin in zip(asked, before, strict=True):
            found = [next(scores) for _ in one.options]
            sums = [score.logprob for score in found]
            lengths = [len(text.removeprefix(" ")) for _, text in one.options]
            by_length = [s / max(n, 1) for s, n in zip(sums, lengths, strict=True)]
            by_token = [s / len(score.logprobs) for s, score in zip(sums, found, strict=True)]
            records.append(
                {
                    **one.told(begin),
                    "gold": one.gold,
                    "choice": best(sums),
                    "logprobs": sums,
                    "acc": float(best(sums) == one.gold),
                    "acc_norm": float(best(by_length) == one.gold),
                    "acc_token": float(best(by_token) == one.gold),
                }
            )
        return records

    return ask


def best(values: Sequence[float]) -> int:
    """The first of the largest."""
    return max(range(len(values)), key=lambda i: values[i])


def finish(made: Callable[[Doc], tuple[str, str]], *, between: str = "\n\n") -> Ask:
    """Ask for the one continuation.

    Records: logprob: of it; acc: whether the model would write it, token by token; n_tokens.
    """

    def ask(answers: Answers, docs: Sequence[Doc], shots: Sequence[Sequence[Doc]]) -> list[Record]:
        asked = [made(doc) for doc in docs]
        before = ["".join("".join(made(shot)) + between for shot in some) for some in shots]
        pairs = [answers.pair(begin + context, text) for begin, (context, text) in zip(before, asked, strict=True)]
        return [
            {
                "prompt": begin + context,
                "continuation": text,
                "logprob": score.logprob,
                "n_tokens": len(score.logprobs),
                "acc": float(score.greedy),
            }
            for begin, (context, text), score in zip(before, asked, answers.scores(pairs), strict=True)
        ]

    return ask
