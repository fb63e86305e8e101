"""LAMBADA: the last word of a passage, which only the whole of it gives away (Paperno et al. 2016)."""

from __future__ import annotations

from megagpt.evaluate.choices import finish
from megagpt.evaluate.task import Doc, Task, json_lines, mean, perplexity


def last_word(doc: Doc) -> tuple[str, str]:
    """The passage without its last word, and the word with the blank before it."""
    context, word = doc["text"].rsplit(" ", 1)
    return context, " " + word


TASKS = (
    Task(
        name="lambada_openai",
        about="the last word of a passage",
        protocol="whole last word, greedy; OpenAI's text; as lm-eval's task of this name",
        source="Paperno et al. 2016; the test set as OpenAI has it (lambada_test.jsonl)",
        files=("lambada/lambada_test.jsonl",),
        read=lambda paths: json_lines(paths, "text"),
        ask=finish(last_word),
        figures={"acc": mean("acc"), "ppl": perplexity()},
    ),
)
