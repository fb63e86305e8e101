"""Text as it comes: whole characters only, nothing of a stop string, and in the end what decoding all at once gives."""

from __future__ import annotations

import io

import pytest
from sentencepiece import SentencePieceTrainer

from megagpt.data.tokenizers.bytes import ByteTokenizer
from megagpt.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megagpt.data.tokenizers.tokenizer import Tokenizer
from megagpt.generate.text import UNFINISHED, TextStream

TEXT = "naïve café — 🙂🙃 日本語\n\tdone.  Two  spaces and some more words, so that the window has to move 🙂"


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["naïve café done words and some more spaces"] * 20),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    """What is shown, token by token and at the end."""
    found = []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.end()]


@pytest.mark.parametrize("n_prompt", [0, 1, 5, 13])
def test_pieces_join_to_the_text_and_never_split_a_character(tokenizer: Tokenizer, n_prompt: int):
    tokens = tokenizer.encode(TEXT)
    assert max(len(tokenizer.encode(c)) for c in "🙂日") >= 3  # characters of several tokens
    prompt, written = tokens[:n_prompt], tokens[n_prompt:]
    found = pieces(TextStream(tokenizer, prompt, ()), written)
    assert tokenizer.decode(prompt).rstrip(UNFINISHED) + "".join(found) == tokenizer.decode(tokens)
    assert not any(UNFINISHED in piece for piece in found)


def test_bytes_that_are_no_character_are_shown_when_what_follows_says_so():
    found = pieces(TextStream(ByteTokenizer(), [], ()), [*b"a\xf0\x9f", ord("b"), *b"\xe6\x97"])
    assert found == ["a", "", "", "\ufffdb", "", "", "\ufffd"]


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (("nd so",), "and "[:1]),
        (("xyz", "more"), "and some "),
        (("words", "more w"), "and some "),
        (("not there",), "and some more words"),
        (("wordsy",), "and some more words"),
        (("ss", "s "), "and some more words"),
        (("🙂",), "and some more words"),
    ],
)
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_meet(tokenizer: Tokenizer, stop, shown):
    stream = TextStream(tokenizer, [], stop)
    found = pieces(stream, tokenizer.encode("and some more words"))
    assert "".join(found) == shown
    assert stream.stopped == (shown != "and some more words")
    # What was shown is never taken back: it was a beginning of the result at all times.
    assert all(shown.startswith("".join(found[:i])) for i in range(len(found)))
