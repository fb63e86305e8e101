"""All tasks, by name: a line a file."""

from __future__ import annotations

from megagpt.evaluate.task import Task
from megagpt.evaluate.tasks import (
    arc,
    cbt,
    core,
    glue,
    hellaswag,
    lambada,
    lm1b,
    openbookqa,
    piqa,
    ptb,
    questions,
    summaries,
    superglue,
    translation,
    wikipedia_bytes,
    wikitext,
    winograd,
    winogrande,
)

ALL: dict[str, Task] = {
    task.name: task
    for file in (
        lambada,
        cbt,
        winograd,
        questions,
        summaries,
        translation,
        hellaswag,
        winogrande,
        piqa,
        arc,
        openbookqa,
        superglue,
        glue,
        core,
        wikitext,
        ptb,
        lm1b,
        wikipedia_bytes,
    )
    for task in file.TASKS
}
