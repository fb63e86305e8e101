"""What OpenAI's API answers: the pieces of texts, as chunks of a stream or as one object. No HTTP."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from megagpt.generate.request import Completion, Piece, TokenLogprobs
from megagpt.generate.text import UNFINISHED
from megagpt.serve.asked import Asked
from megagpt.serve.served import Served

FINISH = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}
LEAST_LOGPROB = -9999.0  # JSON has no -inf
OBJECTS = {
    "completion": ("text_completion", "text_completion"),
    "chat": ("chat.completion", "chat.completion.chunk"),
}


class Answer:
    """Grows by pieces; index counts texts, those of the first prompt first."""

    def __init__(self, asked: Asked, served: Served) -> None:
        self.asked, self.served = asked, served
        self.texts = [Completion() for _ in asked.requests for _ in range(asked.n)]
        whole, chunk = OBJECTS[asked.kind]
        self._head = {"id": f"{'chatcmpl' if asked.kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"}
        self._head |= {"object": chunk if asked.stream else whole, "created": int(time.time()), "model": served.name}
        self._begun: set[int] = set()  # texts of which something has been sent
        self._n_told = [-self._n_unseen(i) for i in range(len(self.texts))]  # characters of each text, by its tokens

    def add(self, index: int, piece: Piece) -> None:
        """Take a piece in."""
        self.texts[index].add(piece)

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """A piece as a chunk of a stream, None where there is nothing to show yet."""
        told = piece.text or piece.finish or piece.prompt or piece.logprobs or (piece.tokens and self.asked.token_ids)
        if not told:
            return None
        first = index not in self._begun
        self._begun.add(index)
        grown = Completion()
        grown.add(piece)
        usage = {"usage": None} if self.asked.usage_in_stream else {}
        return self._head | {"choices": [self._choice(index, grown, first)]} | usage

    def whole(self) -> dict[str, Any]:
        """All texts, once they are ended."""
        choices = [self._choice(index, text, first=True) for index, text in enumerate(self.texts)]
        return self._head | {"choices": choices, "usage": self.usage}

    def last_chunk(self) -> dict[str, Any]:
        """What ends a stream of which the usage was wanted."""
        return self._head | {"choices": [], "usage": self.usage}

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        read = sum(len(request.prompt) for request in self.asked.requests)
        written = sum(len(text.tokens) for text in self.texts)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _choice(self, index: int, text: Completion, first: bool) -> dict[str, Any]:
        """text: one, or what is new of it.  first: whether it is the beginning."""
        asked, number = self.asked, index // self.asked.n
        choice: dict[str, Any] = {"index": index, "finish_reason": FINISH[text.finish] if text.finish else None}
        if asked.token_ids:
            choice["token_ids"] = text.tokens
            choice |= {"prompt_token_ids": asked.requests[number].prompt} if first else {}
        if asked.kind == "chat":
            message = ({"role": "assistant"} if first else {}) | {"content": text.text}
            told = None if asked.logprobs is None else {"content": [self._told(entry) for entry in text.logprobs]}
            return choice | {"delta" if asked.stream else "message": message, "logprobs": told}
        echoed = asked.echoed[number] if asked.echoed and first else ""
        told = None if asked.logprobs is None else self._columns(index, [*text.prompt_logprobs, *text.logprobs])
        return choice | {"text": echoed + text.text, "logprobs": told}

    def _told(self, entry: TokenLogprobs) -> dict[str, Any]:
        """A token of a chat."""
        likeliest = [self._token(token, logprob) for token, logprob in entry.likeliest]
        return self._token(entry.token, entry.logprob) | {"top_logprobs": likeliest}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.served.token_text(token)
        known = None if UNFINISHED in text else list(text.encode())  # of a part of a character they are not
        return {"token": text, "logprob": _finite(logprob), "bytes": known}

    def _columns(self, index: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Tokens of a completion, side by side."""
        tokens = [self.served.token_text(entry.token) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(max(0, self._n_told[index]))
            self._n_told[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [self._likeliest(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _n_unseen(self, index: int) -> int:
        """Characters of what begins the prompt, where it is repeated, and its text has none of them."""
        number = index // self.asked.n
        return (
            self.served.unseen(self.asked.echoed[number], self.asked.requests[number].prompt)
            if self.asked.echoed
            else 0
        )

    def _likeliest(self, entry: TokenLogprobs) -> dict[str, float | None] | None:
        """By text, the token that is there among them; of several with one text, the likeliest."""
        if entry.logprob is None:
            return None
        found: dict[str, float | None] = {}
        for token, logprob in (*entry.likeliest, (entry.token, entry.logprob)):
            found.setdefault(self.served.token_text(token), _finite(logprob))
        return found


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
