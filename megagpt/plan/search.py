"""The best layouts of a model on so many GPUs, by the cost model; and why others were not taken. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megagpt.config import ModelConfig
from megagpt.errors import UserError, divisors
from megagpt.plan.fit import shares_model
from megagpt.plan.footprint import Footprint, fits, footprint, fullest_bytes
from megagpt.plan.job import Engine, Job, Layout
from megagpt.plan.machine import Machine
from megagpt.plan.step import Step, step_time

# What megagpt does today: DeepSpeed's engines, which overlap gradients only at ZeRO-3, and its 1F1B pipeline. With
# bf16, gradients are added up in 32 bits.
TODAY = Engine(stages="work")
# What published engines do beyond: sends and sums beside work, gradients added up by the product that makes them.
POSSIBLE = Engine(
    stages="work", overlap_tp=True, overlap_grads=True, overlap_params=True, overlap_p2p=True, scatter_p2p=True,
    fused_wgrad=True,
)  # fmt: skip

_MICRO_BATCHES = (1, 2, 4, 8, 16)
_CONTEXTS = (1, 2, 4, 8, 16)
_LONG = 8192  # tokens from which splitting a sequence is looked at
_SIMULATED = 24  # of the layouts that an estimate puts first
_MOST_GPUS = 2**20


@dataclass(frozen=True)
class Found:
    """A layout, what a step of it takes, and what it keeps."""

    job: Job
    step: Step
    footprint: Footprint

    @property
    def tokens_per_s(self) -> float:
        """Of all GPUs."""
        return self.job.layout.global_batch * self.job.model.seq_len / self.step.seconds


@dataclass(frozen=True)
class Search:
    """best: fastest first.  rejected: how many layouts by reason."""

    best: tuple[Found, ...]
    rejected: dict[str, int]


def lacks(layout: Layout) -> list[str]:
    """What of a layout megagpt does not run today."""
    wanted = {
        "sequence parallel": layout.sequence_parallel,
        "context parallel": layout.cp > 1,
        "interleaved stages": layout.schedule == "interleaved",
        "zero bubble": layout.schedule == "zero_bubble",
        "ZeRO 2 or 3 with a pipeline": layout.pp > 1 and layout.zero > 1,
    }
    return [name for name, has in wanted.items() if has]


def runs_today(layout: Layout) -> bool:
    """Whether megagpt runs it today."""
    return not lacks(layout)


def search(
    model: ModelConfig,
    gpus: int,
    global_batch: int,
    machine: Machine,
    engine: Engine,
    may: Callable[[Layout], bool] = lambda layout: True,
    count: int = 5,
) -> Search:
    """The fastest layouts that fit, estimated first and, those that come first, simulated.

    may: which layouts the engine runs.
    Raises: UserError where none fits, with what is missing.
    """
    if not 1 <= gpus <= _MOST_GPUS:
        raise UserError(f"--gpus {gpus} is no number of GPUs; use 1 to {_MOST_GPUS}")
    rejected: Counter[str] = Counter()
    fitting, leanest = [], None
    for layout in _layouts(model, gpus, global_batch, machine, rejected):
        if not may(layout):
            rejected["is not run by this engine"] += 1
            continue
        job = Job(model, layout, _as_run(engine, layout), machine)
        if fits(job):
            fitting.append(job)
        else:
            rejected["does not fit the memory"] += 1
            if leanest is None or fullest_bytes(job) < fullest_bytes(leanest):
                leanest = job
    if not fitting:
        raise _none_fits(gpus, global_batch, leanest, machine)
    fitting.sort(key=lambda job: step_time(job, simulated=False).seconds)
    found = [Found(job, step_time(job), footprint(job)) for job in fitting[:_SIMULATED]]
    found.sort(key=lambda f: f.step.seconds)
    rejected["fits, and is slower"] = len(fitting) - min(count, len(found))
    return Search(tuple(found[:count]), dict(rejected))


def _as_run(engine: Engine, layout: Layout) -> Engine:
    """DeepSpeed overlaps at ZeRO-3 by itself."""
    return replace(engine, overlap_grads=True, overlap_params=True) if layout.zero == 3 else engine


def _layouts(
    model: ModelConfig, gpus: int, global_batch: int, machine: Machine, rejected: Counter[str]
) -> Iterator[Layout]:
    for tp in divisors(min(gpus, machine.gpus_per_node)):
        if gpus % tp:
            continue
        if not shares_model(model, tp):
            rejected["tp does not divide the heads"] += 1
            continue
        for cp in (c for c in _CONTEXTS if (gpus // tp) % c == 0 and (c == 1 or model.seq_len >= _LONG)):
            for pp in divisors(gpus // tp // cp, model.n_layers):
                dp = gpus // tp // cp // pp
                if global_batch % dp:
                    rejected["dp does not divide the batch"] += 1
                    continue
                yield from _choices(model, Layout(gpus, tp=tp, pp=pp, dp=dp, cp=cp, global_batch=global_batch))


def _choices(model: ModelConfig, base: Layout) -> Iterator[Layout]:
    """Micro-batch, ZeRO, recompute, sequence parallel, schedule, for sizes of the axes."""
    copies = base.dp * base.cp
    zeros = (0,) if copies == 1 else (1, 3) if base.pp == 1 else (1,)
    for micro in (m for m in _MICRO_BATCHES if (base.global_batch // base.dp) % m == 0):
        for virtual, schedule in _schedules(model, base, base.global_batch // base.dp // micro):
            for zero in zeros:
                for parallel in (False, True) if base.tp > 1 else (False,):
                    for recompute in ("none", "full"):
                        yield replace(
                            base, micro_batch=micro, zero=zero, recompute=recompute, sequence_parallel=parallel,
                            virtual=virtual, schedule=schedule,
                        )  # fmt: skip


def _schedules(model: ModelConfig, base: Layout, micro_batches: int) -> Iterator[tuple[int, str]]:
    yield 1, "1f1b"
    if base.pp == 1:
        return
    yield 1, "zero_bubble"
    if micro_batches % base.pp == 0:
        each = model.n_layers // base.pp
        yield from ((v, "interleaved") for v in sorted({*divisors(each, 4), each}) if 1 < v <= each)


def _none_fits(gpus: int, global_batch: int, leanest: Job | None, machine: Machine) -> UserError:
    if leanest is None:
        return UserError(
            f"--gpus {gpus} with a batch of {global_batch} sequences",
            "leaves no layout whose sizes divide heads, layers and batch",
            "use another number of GPUs, or --global-batch-size",
        )
    needs, has = fullest_bytes(leanest) / 2**30, machine.memory_bytes / 2**30
    return UserError(
        f"--gpus {gpus} of {has:.0f} GiB", f"hold no layout: the leanest needs {needs:.0f} GiB a GPU", "use more GPUs"
    )
