"""What a step takes, by kind. No torch.

The busiest rank's work, the pipeline's bubble by simulation, what of the data axis's communication nothing hides, and
the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.plan.job import Job, local_params, step_flops, vocab_rows
from megagpt.plan.kernels import KINDS, WIDTH, Times, block_times, head_times, smooth_max
from megagpt.plan.network import all_reduce_s, axis_groups, gather_s, send_s
from megagpt.plan.pipeline import Durations, estimated_s, pipeline_s

STEP_KINDS = (*KINDS, "pipeline", "bubble", "data", "optimizer", "other")
ADAM_BYTES = 34  # a parameter's way through Adam: gradient, master, two moments read; three written, and 16 bits


@dataclass(frozen=True)
class Step:
    """Seconds of a step. kinds: by STEP_KINDS, of the rank that the others wait for; data_hidden: beside them."""

    seconds: float
    kinds: dict[str, float]
    data_hidden: float
    flops: float

    def tflops_per_gpu(self, gpus: int) -> float:
        """Model TFLOP/s, without what is recomputed."""
        return self.flops / self.seconds / gpus / 1e12


def step_time(job: Job, simulated: bool = True) -> Step:
    """Seconds of a step of this job, and what they go into. simulated: its pipeline, rather than estimated."""
    layout, machine = job.layout, job.machine
    forward, backward = stage_times(job)
    ahead, back = [t.total for t in forward], [t.total for t in backward]
    sharded, hidden = _sharded(job, ahead, back)
    durations = _durations(job, ahead, back)
    m, pp, v = layout.micro_batches, layout.pp, layout.virtual
    taken = pipeline_s if simulated else estimated_s
    pipe = taken(layout.schedule, pp, v, m, durations) if pp > 1 else m * (ahead[0] + back[0])
    busiest = max(range(pp), key=lambda rank: sum(ahead[rank::pp]) + sum(back[rank::pp]))
    work = Times()
    for stage in range(busiest, pp * v, pp):
        work += (forward[stage] + backward[stage]) * m
    handed = 0.0 if job.engine.overlap_p2p or pp == 1 else m * v * 2 * durations.send
    data, hidden_data = _data(job, max(back), max(ahead))
    kinds = {kind: getattr(work, kind) for kind in KINDS}
    kinds["pipeline"] = min(handed, max(0.0, pipe - work.total))
    kinds["bubble"] = max(0.0, pipe - work.total - kinds["pipeline"])
    kinds["data"] = data + sharded * m
    kinds["optimizer"] = _optimizer_s(job)
    kinds["other"] = machine.constants.step_ms * 1e-3
    seconds = sum(kinds.values())
    return Step(seconds, kinds, hidden_data + hidden * m, step_flops(job.model, layout.global_batch))


def stage_times(job: Job) -> tuple[list[Times], list[Times]]:
    """Forward and backward of each stage, the virtual ones of all ranks in their order."""
    block, block_back = block_times(job)
    head, head_back = head_times(job)
    forward = [block * n for n in job.stage_blocks]
    backward = [block_back * n for n in job.stage_blocks]
    forward[-1] += head
    backward[-1] += head_back
    return forward, backward


def pipeline_durations(job: Job) -> Durations:
    """What the tasks of a pipeline take."""
    forward, backward = stage_times(job)
    return _durations(job, [t.total for t in forward], [t.total for t in backward])


def _durations(job: Job, ahead: list[float], back: list[float]) -> Durations:
    """A third or half of a backward pass makes the gradients of weights."""
    share = 1 / 3 if job.layout.recompute == "full" else 1 / 2
    return Durations(ahead, back, [share * b for b in back], _send_s(job), job.engine.overlap_p2p)


def _send_s(job: Job) -> float:
    if job.layout.pp == 1:
        return 0.0
    shares = job.layout.tp if job.layout.sequence_parallel or job.engine.scatter_p2p else 1
    return send_s(job.tokens * job.model.d_model * WIDTH / shares, job.layout, job.machine)


def rank_params(job: Job) -> int:
    """Parameters on the rank that holds most of them."""
    embedding, block, head = local_params(job.model, job.layout.tp)
    pp, blocks = job.layout.pp, job.stage_blocks
    sums = [sum(blocks[rank::pp]) * block for rank in range(pp)]
    sums[0] += embedding
    tied = job.model.tied_embeddings and pp > 1
    sums[-1] += head + (vocab_rows(job.model, job.layout.tp) * job.model.d_model if tied else 0)
    return max(sums)


def _sharded(job: Job, ahead: list[float], back: list[float]) -> tuple[float, float]:
    """ZeRO-3's communication of a micro-batch, exposed and hidden: parameters gathered twice, gradients scattered."""
    layout, machine = job.layout, job.machine
    if layout.zero < 3:
        return 0.0, 0.0
    groups, params = axis_groups(layout, machine), rank_params(job)
    pieces = job.engine.gathers * sum(job.stage_blocks) // layout.pp
    gather = pieces * gather_s(params * WIDTH / pieces, groups["shard"], machine)
    scatter = pieces * gather_s(params * job.engine.grad_bytes / pieces, groups["shard"], machine)
    if layout.shards < layout.dp * layout.cp:  # copies of the shards: their gradients are summed over nodes
        scatter += all_reduce_s(params * job.engine.grad_bytes / layout.shards, groups["data"], machine)
    work, work_back = max(ahead), max(back)
    whole = 2 * gather + scatter
    exposed = smooth_max(work, gather) - work + smooth_max(work_back, gather + scatter) - work_back
    return exposed, max(0.0, whole - exposed)


def _data(job: Job, back: float, ahead: float) -> tuple[float, float]:
    """Communication of the data axis once a step, exposed and hidden: gradients, and parameters that ZeRO shared out.

    back, ahead: the last micro-batch's backward pass and the next step's first forward pass, which may hide them.
    """
    layout, machine, engine = job.layout, job.machine, job.engine
    tied = _tied_s(job)
    if layout.zero >= 3:
        return tied, 0.0
    group, params = axis_groups(layout, machine)["data"], rank_params(job)
    if layout.zero == 0:
        gradients, gathered = all_reduce_s(params * engine.grad_bytes, group, machine), 0.0
    else:
        gradients = gather_s(params * engine.grad_bytes, group, machine)
        gathered = gather_s(params * WIDTH, group, machine)
    hide = machine.constants.dp_hidden
    hidden = min(hide * gradients, back) if engine.overlap_grads else 0.0
    hidden += min(hide * gathered, ahead) if engine.overlap_params else 0.0
    return gradients + gathered - hidden + tied, hidden


def _tied_s(job: Job) -> float:
    """The first and the last stage add up their gradients of a tied embedding."""
    layout = job.layout
    if layout.pp == 1 or not job.model.tied_embeddings:
        return 0.0
    size = vocab_rows(job.model, layout.tp) * job.model.d_model * job.engine.grad_bytes
    return 2 * send_s(size, layout, job.machine)


def _optimizer_s(job: Job) -> float:
    params = rank_params(job) / (job.layout.shards if job.layout.zero >= 1 else 1)
    return params * ADAM_BYTES / (job.machine.bandwidth * job.machine.constants.memory)
