"""All tasks, by name: a line a file."""

from __future__ import annotations

from megagpt.evaluate.task import Task
from megagpt.evaluate.tasks import lambada, piqa

ALL: dict[str, Task] = {
    task.name: task
    for file in (
        lambada,
        piqa,
    )
    for task in file.TASKS
}
