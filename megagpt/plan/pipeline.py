"""Who works when: an event simulation of a pipeline's schedule. No torch.

Schedules: 1F1B (Narayanan et al. 2021, section 2.2.1), interleaved stages (2.2.2), zero bubble H1 (Qi et al. 2023,
section 4), where the backward pass to the input and that to the weights are two tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megagpt.plan.job import ScheduleName


class Task(NamedTuple):
    """kind: F forward, B backward (to the input, where weights are apart), W backward to the weights."""

    kind: str
    stage: int
    micro: int


@dataclass(frozen=True)
class Event:
    """A task, done by a rank from start_s to end_s."""

    rank: int
    task: Task
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Durations:
    """Seconds of each stage's tasks, and of a hand-over.

    forward, backward: by stage, the virtual ones of all ranks in their order. weights: of backward, the part that only
    the optimizer waits for.  send: added to each task that hands over; where it runs beside work it delays only who
    waits for it (overlapped).
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weights: Sequence[float]
    send: float = 0.0
    overlapped: bool = False


def order(schedule: ScheduleName, rank: int, pp: int, virtual: int, micro_batches: int) -> list[Task]:
    """The tasks of a rank, in its order."""
    if schedule == "interleaved" and virtual > 1:
        return _interleaved(rank, pp, virtual, micro_batches)
    split = schedule == "zero_bubble"
    warm = min(pp - rank - 1, micro_batches)
    tasks = [Task("F", rank, i) for i in range(warm)]
    waiting: list[int] = []  # micro-batches whose weights' part is put off
    for i in range(micro_batches):
        if warm + i < micro_batches:
            tasks.append(Task("F", rank, warm + i))
        tasks.append(Task("B", rank, i))
        if split:
            waiting.append(i)
            if len(waiting) > rank or warm + i >= micro_batches:  # H1: memory stays that of 1F1B
                tasks.append(Task("W", rank, waiting.pop(0)))
    return tasks + [Task("W", rank, i) for i in waiting]


def simulate(schedule: ScheduleName, pp: int, virtual: int, micro_batches: int, durations: Durations) -> list[Event]:
    """When each task runs: as soon as its rank is free and what it needs has arrived, in the rank's order."""
    listed = _listed(schedule, pp, virtual, micro_batches)
    starts, ends = _run(listed, pp, virtual, schedule == "zero_bubble", durations)
    return [Event(step.rank, step.task, *times) for step, *times in zip(listed, starts, ends, strict=True)]


class _Step(NamedTuple):
    """A task in an order in which each stands behind what it needs.

    needs: index of the task before, -1 for none.  arrives: whether that one is another rank's.
    """

    rank: int
    task: Task
    needs: int
    arrives: bool


@lru_cache(maxsize=512)
def _listed(schedule: ScheduleName, pp: int, virtual: int, micro_batches: int) -> list[_Step]:
    queues = [order(schedule, rank, pp, virtual, micro_batches) for rank in range(pp)]
    last, at = pp * virtual - 1, [0] * pp
    index: dict[Task, int] = {}
    steps: list[_Step] = []
    while len(steps) < sum(map(len, queues)):
        for rank, queue in enumerate(queues):
            while at[rank] < len(queue):
                task = queue[at[rank]]
                needed, arrives = _needs(task, last)
                if needed is not None and needed not in index:
                    break
                index[task] = len(steps)
                steps.append(_Step(rank, task, -1 if needed is None else index[needed], arrives))
                at[rank] += 1
    return steps


def _run(
    steps: list[_Step], pp: int, virtual: int, split: bool, durations: Durations
) -> tuple[list[float], list[float]]:
    """Start and end of each step."""
    handed = [0.0 if durations.overlapped else durations.send] * (pp * virtual)
    forward = [f + h for f, h in zip(durations.forward, [*handed[1:], 0.0], strict=True)]
    backward = [b + h for b, h in zip(durations.backward, [0.0, *handed[1:]], strict=True)]
    if split:
        backward = [b - w for b, w in zip(backward, durations.weights, strict=True)]
    lengths = {"F": forward, "B": backward, "W": durations.weights}
    delay = durations.send if durations.overlapped else 0.0
    free, starts, ends = [0.0] * pp, [], []
    for rank, task, needs, arrives in steps:
        start = free[rank]
        if needs >= 0:
            start = max(start, ends[needs] + delay if arrives else ends[needs])
        end = start + lengths[task.kind][task.stage]
        free[rank] = end
        starts.append(start)
        ends.append(end)
    return starts, ends


def pipeline_s(schedule: ScheduleName, pp: int, virtual: int, micro_batches: int, durations: Durations) -> float:
    """Seconds from the first task to the last. Beyond the first rounds each adds the slowest rank's work."""
    rounds = min(micro_batches, pp + 2)
    if schedule == "interleaved" and virtual > 1:
        rounds = min(-(-micro_batches // pp) * pp, 2 * pp)
    steps = _listed(schedule, pp, virtual, rounds)
    end = max(_run(steps, pp, virtual, schedule == "zero_bubble", durations)[1])
    return end + max(0, micro_batches - rounds) * slowest_rank_s(pp, durations)


def estimated_s(schedule: ScheduleName, pp: int, virtual: int, micro_batches: int, durations: Durations) -> float:
    """The same by formula: the slowest rank's work, and (pp - 1) / virtual micro-batches of the others' around it
    (Narayanan et al. 2021, section 2.2); with zero bubble a third of them.
    """
    mean = (sum(durations.forward) + sum(durations.backward)) / pp + 2 * durations.send
    waits = (pp - 1) / virtual / (3 if schedule == "zero_bubble" else 1)
    return micro_batches * slowest_rank_s(pp, durations) + waits * mean


def slowest_rank_s(pp: int, durations: Durations) -> float:
    """Work of a micro-batch on the rank that has most of it."""
    n_stages = len(durations.forward)
    handed = 0.0 if durations.overlapped else durations.send
    return max(
        sum(
            durations.forward[s] + durations.backward[s] + handed * ((s < n_stages - 1) + (s > 0))
            for s in range(rank, n_stages, pp)
        )
        for rank in range(pp)
    )


def _interleaved(rank: int, pp: int, virtual: int, micro_batches: int) -> list[Task]:
    """Megatron-LM's order: groups of pp micro-batches go through a rank's stages in turn."""
    micro_batches = -(-micro_batches // pp) * pp
    total = micro_batches * virtual

    def forward(i: int) -> Task:
        group, place = divmod(i, pp * virtual)
        return Task("F", place // pp * pp + rank, group * pp + place % pp)

    def backward(i: int) -> Task:
        group, place = divmod(i, pp * virtual)
        return Task("B", (virtual - 1 - place // pp) * pp + rank, group * pp + place % pp)

    warm = min((pp - rank - 1) * 2 + (virtual - 1) * pp, total)
    tasks = [forward(i) for i in range(warm)]
    for i in range(total - warm):
        tasks += [forward(warm + i), backward(i)]
    return tasks + [backward(i) for i in range(total - warm, total)]


def _needs(task: Task, last: int) -> tuple[Task | None, bool]:
    """The task that must be done before, and whether its result comes from another rank."""
    if task.kind == "W":
        return Task("B", task.stage, task.micro), False
    if task.kind == "F":
        return (None, False) if task.stage == 0 else (Task("F", task.stage - 1, task.micro), True)
    if task.stage == last:
        return Task("F", task.stage, task.micro), False
    return Task("B", task.stage + 1, task.micro), True
