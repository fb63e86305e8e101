"""CNN/Daily Mail: summaries, hinted at by TL;DR: (Nallapati et al. 2016; asked as Radford et al. 2019, section 3.6)."""

from __future__ import annotations

import re

from megagpt.evaluate.task import Doc, Record, Task, json_lines, mean
from megagpt.evaluate.writing import rouge, write
from megagpt.generate.request import Sampling


def beginning(text: str, n: int = 3) -> str:
    """The first sentences, each up to a full stop, question or exclamation mark, or the end of a line."""
    return " ".join([part.strip() for part in re.split(r"(?<=[.!?])\s+|\n", text) if part.strip()][:n])


def judged(doc: Doc, text: str) -> Record:
    """ROUGE of the first three sentences."""
    return {"summary": beginning(text), "gold": doc["highlights"], **rouge(beginning(text), doc["highlights"])}


TASKS = (
    Task(
        name="cnn_dailymail",
        about="a summary of a news article",
        protocol="after TL;DR:, 100 tokens drawn among the two likeliest, the first three sentences; GPT-2 paper",
        source="Nallapati et al. 2016, See et al. 2017; version 3.0.0, non-anonymised: article and highlights a line",
        files=("cnn_dailymail/test.jsonl",),
        example=('{"article": "It rained for a week. Roads are closed.", "highlights": "Rain closes roads."}',),
        training=("cnn_dailymail/train.jsonl",),
        read=lambda paths: json_lines(paths, "article", "highlights"),
        ask=write(
            lambda doc: (f"{doc['article']}\nTL;DR:", " " + doc["highlights"]),
            judged,
            Sampling(n_tokens=100, temperature=1.0, top_k=2),
        ),
        figures={name: mean(name) for name in ("rouge1", "rouge2", "rougeL")},
    ),
)
