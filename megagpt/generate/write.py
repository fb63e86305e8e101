"""From logits to what texts gain: a token is drawn, becomes text, and may end it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megagpt.errors import UserError
from megagpt.generate.batching import Sample
from megagpt.generate.draw import draw, logprobs_of, uniform_at
from megagpt.generate.request import Finish, Piece, TokenLogprobs
from megagpt.generate.text import TextStream

if TYPE_CHECKING:
    from megagpt.data.tokenizers.tokenizer import Tokenizer


class Writer:
    """Of the samples under way, the text so far; on the one rank of a model that draws.

    n_places: tokens that a context holds.
    """

    def __init__(self, tokenizer: Tokenizer | None, n_places: int) -> None:
        self.tokenizer, self.n_places = tokenizer, n_places
        self.texts: dict[Sample, TextStream] = {}

    def write(self, samples: list[Sample], logits_NV: Tensor) -> list[Piece]:
        """The next token of each.  Shapes: logits_NV, N samples.  Raises UserError where the model gives no numbers."""
        if bool(logits_NV.isnan().any()):
            raise UserError("the model gives NaN for the next token", remedy="verify its weights: tools/checkpoint.py")
        likeliest = logits_NV.argmax(-1).tolist()
        if not all(sample.sampling.greedy for sample in samples):
            logits_NV = logits_NV.float().cpu()
        return [self._next(*entry) for entry in zip(samples, logits_NV, likeliest, strict=True)]

    def forget(self, sample: Sample) -> None:
        """It was given up."""
        self.texts.pop(sample, None)

    def _next(self, sample: Sample, logits_V: Tensor, token: int) -> Piece:
        sampling, logprobs = sample.sampling, ()
        if sample.finish is not None:
            return Piece(sample.number, sample.index, finish=sample.finish)
        if not sampling.greedy:
            uniform = uniform_at(sampling.seed, sample.index, sample.n_written)
            token = draw(logits_V, sampling, uniform, sample.request.prompt, sample.written)
        if sampling.logprobs is not None:
            logprobs = tuple(logprobs_of(logits_V[None], (token,), sampling.logprobs))
        if token in sample.request.ends:
            return Piece(sample.number, sample.index, (), self._end(sample), logprobs, finish="stop")
        return self._piece(sample, token, logprobs)

    def _piece(self, sample: Sample, token: int, logprobs: tuple[TokenLogprobs, ...]) -> Piece:
        if self.tokenizer is not None and sample not in self.texts:
            self.texts[sample] = TextStream(self.tokenizer, sample.request.prompt, sample.sampling.stop)
        text = self.texts.get(sample)
        shown, finish = text.push(token) if text else "", self._finish(sample, text)
        if finish:
            shown += self._end(sample)
        return Piece(sample.number, sample.index, (token,), shown, logprobs, finish=finish)

    def _finish(self, sample: Sample, text: TextStream | None) -> Finish | None:
        """Whether a text ends with the token that was just drawn, and why."""
        if text and text.stopped:
            return "stop"
        if sample.n_written + 1 >= sample.sampling.n_tokens:
            return "length"
        return "context" if sample.n_window + 1 > self.n_places and not sample.sampling.slide else None

    def _end(self, sample: Sample) -> str:
        """What was held back."""
        text = self.texts.pop(sample, None)
        return text.end() if text else ""
