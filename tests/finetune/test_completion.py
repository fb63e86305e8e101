"""Completion pairs and messages: what is learned of them, what is cut, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megagpt.data.tokenizers.tokenizer import Bounds
from megagpt.errors import UserError
from megagpt.finetune.completion import Completion, Render
from megagpt.finetune.example import Document
from megagpt.serve.chat import ChatTemplate
from tests.finetune.examples import READING, write_lines

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EOD = "␄"


def task() -> Completion:
    def template() -> Render:
        found = ChatTemplate(TEMPLATE, {})
        return found.render

    return Completion(template)


def text(document: Document, learned: bool) -> str:
    """What of a document's labels is learned, or is not; the first token is no label."""
    ids = [int(i) for i, counts in zip(document.ids[1:], document.counts, strict=True) if bool(counts) == learned]
    return "".join(EOD if i == 256 else chr(i) for i in ids)


def only(path, reading=READING) -> Document:
    (example,) = task().read(path, reading).found
    (document,) = example.documents
    return document


def test_of_a_pair_the_completion_and_its_end_are_learned(tmp_path):
    document = only(write_lines(tmp_path / "a.jsonl", [{"prompt": "2+2=", "completion": "four"}]))
    assert text(document, learned=True) == f"four{EOD}" and text(document, learned=False) == "+2="


def test_without_a_prompt_the_first_token_follows_from_nothing(tmp_path):
    document = only(write_lines(tmp_path / "a.jsonl", [{"prompt": "", "completion": "four"}]))
    assert text(document, learned=True) == f"our{EOD}"


def test_what_begins_a_text_stands_before_the_prompt(tmp_path):
    reading = replace(READING, bounds=Bounds(begin=(7,)))
    document = only(write_lines(tmp_path / "a.jsonl", [{"prompt": "q" * 90, "completion": "a"}]), reading)
    assert document.ids[0] == 7 and text(document, learned=True) == f"a{EOD}"  # and is not cut


def test_of_messages_each_answer_is_learned(tmp_path):
    talk = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao")]
    messages = [{"role": role, "content": content} for role, content in talk]
    reading = replace(READING, seq_len=200)
    document = only(write_lines(tmp_path / "a.jsonl", [{"messages": messages}]), reading)
    assert text(document, learned=True) == "Hello</>Ciao</>"
    assert text(document, learned=False) == "user>Hi</><assistant><user>Bye</><assistant>"


def test_what_is_cut_is_said(tmp_path):
    rows = [{"prompt": "short", "completion": "a"}, {"prompt": "p" * 100, "completion": "c" * 80}]
    read = task().read(write_lines(tmp_path / "a.jsonl", rows), READING)
    (note,) = read.notes
    assert "1 of 2 examples are longer than a row of 48 tokens (the first in line 2)" in note
    assert "99 tokens of prompts, 33 tokens of completions are cut" in note
    (document,) = read.found[1].documents
    assert text(document, learned=True) == "c" * 48 and len(document.counts) == 48


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2: got a list wanted an object"),
        ('{"prompt": "a"}', "line 2: got the keys prompt wanted texts under prompt and completion"),
        ('{"prompt": "a", "completion": ""}', "wanted texts under prompt and completion"),
        ('{"messages": "hello"}', "line 2: messages must be a list of objects with role and content"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message is an assistant's"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, words):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + row + "\n")
    with pytest.raises(UserError) as caught:
        task().read(path, READING)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_a_template_that_changes_what_was_said_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}])
    lengthens = Completion(lambda: lambda messages, follows: f"{len(messages)}")
    with pytest.raises(UserError, match="must render the beginning of a talk as the beginning of its text"):
        lengthens.read(path, READING)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        task().read(tmp_path / "none.jsonl", READING)
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt"\n\xff\n')
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        task().read(tmp_path / "bad.jsonl", READING)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no example"):
        task().read(tmp_path / "empty.jsonl", READING)
