"""Instruction and completion pairs from JSON lines; the loss is of the completions alone. No torch.

    {"prompt": "Capital of France?", "completion": " Paris"}
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}

Messages become text by a chat template, as serving renders them (serve/chat.py); what an assistant says is learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.errors import UserError
from megagpt.finetune.example import Cuts, Document, Example, Examples
from megagpt.finetune.task import Reading, Task, text_of

Piece = tuple[str, bool]
"""A stretch of text, and whether it is learned."""
Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""Messages as text; whether an answer follows."""


class Completion(Task):
    """template: that of messages, asked for where there are some."""

    def __init__(self, template: Callable[[], Render]) -> None:
        self._template = template

    def read(self, path: Path, reading: Reading, *, answered: bool = True) -> Examples:
        """One example a line."""
        text, sha256 = text_of(path, "--train-file and --valid-file")
        cuts, examples, render = Cuts(reading.seq_len), [], None
        for line, row in _rows(path, text):
            if "messages" in row:
                render = render or self._template()
                pieces, is_chat = _turns(row["messages"], render, f"{path}: line {line}"), True
            else:
                pieces, is_chat = _pair(row, f"{path}: line {line}"), False
            document, lost = _document(pieces, reading, is_chat)
            cuts.add(line, prompts=lost[0], completions=lost[1])
            examples.append(Example((document,), line))
        if not examples:
            raise UserError(f"{path} holds no example", remedy='write lines {"prompt": …, "completion": …}')
        return Examples(str(path), examples, cuts.notes(str(path), len(examples)), sha256)


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, words in enumerate(text.split("\n"), 1):
        if not words.strip():
            continue
        try:
            row = json.loads(words)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {line} is no JSON ({error})", remedy="write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {line}: got a {type(row).__name__}", "wanted an object", "mend the line")
        yield line, row


def _pair(row: Mapping[str, Any], where: str) -> list[Piece]:
    found = [row.get(key) for key in ("prompt", "completion")]
    if not all(isinstance(text, str) for text in found) or not found[1]:
        wanted = "wanted texts under prompt and completion, or a list under messages"
        raise UserError(f"{where}: got the keys {', '.join(row) or '(none)'}", wanted, "mend the line")
    return [(str(found[0]), False), (str(found[1]), True)]


def _turns(messages: Any, render: Render, where: str) -> list[Piece]:
    """The template's text, cut where an assistant begins and ends to speak."""
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if not is_list or not all(isinstance(message.get("role"), str) for message in messages):
        raise UserError(f"{where}: messages", "must be a list of objects with role and content", "mend the line")
    pieces, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before, after = render(messages[:i], True), render(messages[: i + 1], False)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if not (before.startswith(done) and after.startswith(before)):
            wanted = "must render the beginning of a talk as the beginning of its text"
            raise UserError(f"{where}: the chat template", wanted, "give another: --finetune.chat-template FILE")
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    if not any(text for text, learned in pieces if learned):
        raise UserError(f"{where}: no message is an assistant's", "so nothing is learned", "drop the line, or add one")
    return pieces


def _document(pieces: Sequence[Piece], reading: Reading, is_chat: bool) -> tuple[Document, tuple[int, int]]:
    """Tokens of a row at most, and how many of prompts and of completions were cut for that.

    Of a prompt the beginning goes, of a completion the end.
    """
    tokenizer = reading.tokenizer
    begin = () if is_chat else reading.bounds.begin
    ids, learned = [*begin], [False] * len(begin)
    for text, is_learned in pieces:
        tokens = tokenizer.encode(text)
        ids += tokens
        learned += [is_learned] * len(tokens)
    if not is_chat and tokenizer.eod is not None:
        ids.append(tokenizer.eod)
        learned.append(True)
    first = learned.index(True) if True in learned else len(learned)
    too_many = max(0, len(ids) - reading.seq_len - 1)
    from_prompt = min(too_many, max(0, first - len(begin) - 1))
    cut, kept = slice(len(begin), len(begin) + from_prompt), reading.seq_len + 1
    del ids[cut], learned[cut]
    lost = from_prompt, len(ids[kept:])
    if first == 0:  # without a prompt its first token has nothing to follow from
        learned[0] = False
    return Document(np.array(ids[:kept], np.int32), np.array(learned[1:kept], bool)), lost
