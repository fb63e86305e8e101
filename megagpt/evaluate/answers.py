"""What a model answers to the questions of tasks; kept in a file, so that an evaluation goes on where it stopped."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megagpt.errors import UserError
from megagpt.evaluate.score import Pair, Score, key_of, request_of_pair, scores_by_slice
from megagpt.files import open_own
from megagpt.generate.complete import answer
from megagpt.generate.request import Request, Sampling
from megagpt.generate.trained import Trained
from megagpt.processes.agree import together

Show = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""

AT_ONCE = 256  # texts that are written before what is known is kept


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


class Answers:
    """A model that is open, and what it has answered: each question is put to it once, over all runs of a program.

    Comm: each method is collective over all ranks, which ask alike.
    """

    def __init__(self, trained: Trained, kept: Path | None = None, show: Show = silent) -> None:
        """kept: file of what is known, one JSON object a line: of this model and of others.  n_cut, counted: questions
        that lost their beginning, since the context does not hold them.

        Raises UserError for a model without a tokenizer, or a file that cannot be read.
        """
        if trained.tokenizer is None:
            raise UserError(
                f"{trained.folder} has no tokenizer",
                "which tasks' texts need",
                "name one: --tokenizer KIND and its files",
            )
        self.trained, self.tokenizer, self.kept, self.show = trained, trained.tokenizer, kept, show
        self.speaks, self.n_cut = trained.mesh.rank == 0, 0
        self.model = together(lambda: model_key(trained))
        box = [together(lambda: read_known(kept, self.model) if kept and self.speaks else {})]
        dist.broadcast_object_list(box, src=0)
        self.known: dict[str, Any] = box[0]

    @property
    def seq_len(self) -> int:
        """Tokens that the model's context holds."""
        return self.trained.config.model.seq_len

    @property
    def empty(self) -> tuple[int, ...]:
        """What a text without a context follows: the token that begins texts, else the end of another one."""
        begin, eod = self.trained.bounds.begin[:1], self.tokenizer.eod
        if not begin and eod is None:
            raise UserError(
                "the tokenizer has no end of text", "which a text without a context follows", "give one that has it"
            )
        return begin or (eod,)  # type: ignore[return-value]

    def pair(self, context: str, continuation: str) -> Pair:
        """Ids of both, cut where the whole text's are; blanks before the cut belong to what follows, as in lm-eval."""
        stripped = context.rstrip()
        if not stripped:
            return self.empty, self.tokenizer.encode(context + continuation)
        continuation = context[len(stripped) :] + continuation
        before, whole = self.tokenizer.encode(stripped), self.tokenizer.encode(stripped + continuation)
        return self.trained.bounds.begun(before), whole[len(before) :]

    def scores(self, pairs: Sequence[Pair]) -> list[Score]:
        """Of each pair's continuation: see `score`."""
        asked = [request_of_pair(pair, self.seq_len) for pair in pairs]
        self._check([request.prompt for request in asked])
        self.n_cut += sum(len(c) + len(t) > len(r.prompt) for (c, t), r in zip(pairs, asked, strict=True))
        keys = [self._key(key_of(request)) for request in asked]
        new = {key: request for key, request in zip(keys, asked, strict=True) if key not in self.known}
        by_request = {key_of(request): key for key, request in new.items()}
        slices = scores_by_slice(
            self.trained.stage, list(new.values()), lambda done, total: self.show("scoring", done, total)
        )
        for requests, scores in slices:
            self._keep({by_request[key_of(r)]: packed(s) for r, s in zip(requests, scores, strict=True)})
        return [unpacked(self.known[key]) for key in keys]

    def texts(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
        """What the model writes after each prompt; those too long for what is to be written lose their beginning."""
        room = self.seq_len - sampling.n_tokens
        if room < 1:
            raise UserError(
                f"a task wants to write {sampling.n_tokens} tokens",
                f"which a context of {self.seq_len} does not hold",
                "leave this task out",
            )
        ends = self.trained.bounds.ends or (() if self.tokenizer.eod is None else (self.tokenizer.eod,))
        asked = [Request(tuple(prompt)[-room:], sampling, ends) for prompt in prompts]
        self._check([request.prompt for request in asked])
        self.n_cut += sum(len(prompt) > room for prompt in prompts)
        keys = [self._key((request.prompt, asdict(sampling), ends)) for request in asked]
        new = {key: request for key, request in zip(keys, asked, strict=True) if key not in self.known}
        todo = sorted(new, key=lambda key: -len(new[key].prompt))
        for start in range(0, len(todo), AT_ONCE):
            some = todo[start : start + AT_ONCE]
            found = answer(self.trained.stage, self.tokenizer, [new[key] for key in some])
            self._keep({key: text.text for key, (text,) in zip(some, found, strict=True)})
            self.show("writing", min(start + AT_ONCE, len(todo)), len(todo))
        return [self.known[key] for key in keys]

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises UserError for a token that the model does not know."""
        largest, vocab = max((max(prompt) for prompt in prompts), default=0), self.trained.config.model.vocab
        if largest >= vocab:
            raise UserError(
                f"the tokenizer ({self.tokenizer.kind}, {self.tokenizer.vocab_size:,} tokens) gives token id {largest}",
                f"wanted 0 to {vocab - 1}, those that the model was trained with",
                "name its own tokenizer: --tokenizer KIND and its files",
            )

    def _key(self, question: object) -> str:
        return hashlib.sha256(json.dumps([self.model, question], sort_keys=True).encode()).hexdigest()

    def _keep(self, new: dict[str, Any]) -> None:
        self.known |= new
        if self.kept and self.speaks:
            with open_own(self.kept, "a") as file:
                file.writelines(json.dumps({"model": self.model, key: value}) + "\n" for key, value in new.items())


def model_key(trained: Trained) -> str:
    """What tells one model from another: its files and weights by name, size and time, its tokenizer and precision."""
    files = [path for path in sorted(trained.folder.iterdir()) if path.is_file()]
    seen = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    tokenizer = trained.tokenizer.sha256 if trained.tokenizer else None
    dtype = str(trained.stage.weight.dtype)
    return hashlib.sha256(json.dumps([str(trained.folder), seen, tokenizer, dtype]).encode()).hexdigest()


def read_known(path: Path, model: str) -> dict[str, Any]:
    """This model's answers; what a run that was killed left of a last line is cut off.

    Raises UserError for a file that is none of answers.
    """
    known: dict[str, Any] = {}
    if not path.exists():
        return known
    try:
        text = path.read_bytes()
        lines = text[: text.rfind(b"\n") + 1].splitlines()
        os.truncate(path, text.rfind(b"\n") + 1)
    except OSError as error:
        raise UserError(f"{path}: {error}", "wanted answers of an evaluation", "name another --out") from None
    for i, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if entry.pop("model") == model:
                known |= entry
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{path}:{i} is no answer of an evaluation", remedy="remove the file") from None
    return known


def packed(score: Score) -> list[str]:
    """As text: 9 bytes a token, in base64."""
    parts = (score.logprobs.astype("<f4"), score.best.astype("<f4"), score.hits.astype(np.uint8))
    return [base64.b64encode(part.tobytes()).decode() for part in parts]


def unpacked(parts: list[str]) -> Score:
    """The inverse."""
    logprobs, best, hits = (base64.b64decode(part) for part in parts)
    return Score(np.frombuffer(logprobs, "<f4"), np.frombuffer(best, "<f4"), np.frombuffer(hits, np.uint8).astype(bool))
