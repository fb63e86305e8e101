"""LAMBADA by its last token, of a model that is there: with stop words and without."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megagpt.data.tokenizers.tokenizer import UNBOUND
from megagpt.evaluate.score import Score
from megagpt.evaluate.tasks.lambada import last_token, last_token_filtered, last_word, stop_words
from megagpt.generate.request import Sampling


class Letters:
    """A tokenizer whose tokens are words, each with the blank before it; of others it makes two tokens each."""

    words = ("a", "cat", "sat", " the", " cat", " mat")

    def encode(self, text: str) -> list[int]:
        words = [" " + word for word in text.split()]
        return [i for word in words for i in ([self.words.index(word)] if word in self.words else [0, 0])]

    def decode(self, ids) -> str:
        return "".join(self.words[i] for i in ids)


class Model:
    """Finds " the" the likeliest, then " mat", " cat"."""

    logits = torch.tensor([-9.0, -9.0, -9.0, 3.0, 1.0, 2.0])
    tokenizer = Letters()

    trained = SimpleNamespace(bounds=UNBOUND)

    def scores(self, pairs):
        found = []
        for _, (token,) in pairs:
            logprobs = self.logits.log_softmax(-1)
            hit = int(self.logits.argmax()) == token
            found.append(Score(logprobs[[token]].numpy(), logprobs.max().numpy()[None], torch.tensor([hit]).numpy()))
        return found

    def texts(self, prompts, sampling: Sampling):
        logits = self.logits.clone()
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        assert sampling.n_tokens == 1 and sampling.temperature == 0
        return [self.tokenizer.decode([int(logits.argmax())]) for _ in prompts]


DOCS = [{"text": "cat mat"}, {"text": "cat the"}, {"text": "mat cat"}]


def test_last_token():
    records = last_token(Model(), DOCS, [[]] * 3)  # type: ignore[arg-type]
    assert [record["acc"] for record in records] == [0, 1, 0]
    assert records[0]["logprob"] == pytest.approx(float(Model.logits.log_softmax(-1)[5]))


def test_a_stop_word_is_never_the_answer():
    records = last_token_filtered(Model(), DOCS, [[]] * 3)  # type: ignore[arg-type]
    assert [record["acc"] for record in records] == [1, 0, 0]
    assert [record["acc_all"] for record in records] == [0, 1, 0]
    assert {"the", "me", "himself"} <= set(stop_words()) and "cat" not in stop_words()


def test_the_last_word_keeps_its_blank():
    assert last_word({"text": "One.\n\nTwo cats"}) == ("One.\n\nTwo", " cats")
