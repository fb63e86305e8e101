"""All tasks, by name: a line a file."""

from __future__ import annotations

from megagpt.evaluate.task import Task
from megagpt.evaluate.tasks import lambada, lm1b, piqa, ptb, wikipedia_bytes, wikitext

ALL: dict[str, Task] = {
    task.name: task
    for file in (
        lambada,
        lm1b,
        piqa,
        ptb,
        wikipedia_bytes,
        wikitext,
    )
    for task in file.TASKS
}
