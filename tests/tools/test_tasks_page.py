"""docs/tasks.md says what the tasks say; each task can read what it is said to read, and ask about it."""

from __future__ import annotations

import math

import pytest

from megagpt.evaluate.task import text_of_record
from megagpt.evaluate.tasks import ALL
from tools.tasks_page import PAGE, NoAnswerError, page, records_of

OF_EXAMPLES = {name: task for name, task in ALL.items() if task.example}
WHOLE = {"wikitext2", "wikitext103", "wikitext2_stream", "wikitext103_stream", "ptb", "lm1b", "text8", "enwik8", "core"}


def test_the_page_is_in_step():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tools/tasks_page.py"


def test_all_but_texts_as_a_whole_have_an_example():
    assert ALL.keys() - OF_EXAMPLES.keys() == WHOLE


@pytest.mark.parametrize("name", OF_EXAMPLES)
def test_an_example_can_be_read_and_asked(name: str):
    task = OF_EXAMPLES[name]
    assert len(task.example) == len(task.files)
    try:
        records = records_of(task)
    except NoAnswerError:
        return
    assert all(text_of_record(record).strip() for record in records)
    assert all(math.isfinite(figure(records)) for figure in task.figures.values())
