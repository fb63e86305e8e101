"""What a job keeps in the memory of its fullest rank, by kind. No torch.

Weights, gradients, optimizer: Rajbhandari et al. 2020, section 3. Activations: Korthikanti et al. 2022, section 4: the
inventory's numbers, of which the residual stream's are cut over the tensor axis by sequence parallelism alone; a byte
for each dropout mask; scores where attention keeps them (5 a s² b); recompute of the scores (selective) or of blocks
(full). Pipeline: pp - rank micro-batches in flight, (1 + (pp - 1) / (pp v)) pp of them with interleaved stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from megagpt.config import ModelConfig
from megagpt.inventory.parameter import kept_numbers
from megagpt.plan.job import Job, layers_of, local_params, vocab_rows
from megagpt.plan.kernels import WIDTH

MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
OPTIMIZER_BYTES = 12  # fp32 masters and Adam's two moments


@dataclass(frozen=True)
class Footprint:
    """Bytes of each stage's rank, by MEMORY_KINDS; `fullest` is that of the rank with most."""

    ranks: tuple[dict[str, float], ...]

    @property
    def fullest(self) -> dict[str, float]:
        """Of the rank that needs most."""
        return max(self.ranks, key=lambda kinds: sum(kinds.values()))

    @property
    def total(self) -> float:
        """Bytes of that rank."""
        return sum(self.fullest.values())


def footprint(job: Job) -> Footprint:
    """Bytes by kind of a rank of each pipeline position."""
    return Footprint(tuple(_rank(job, rank) for rank in range(job.layout.pp)))


def fits(job: Job) -> bool:
    """Whether no stage is empty, and the fullest rank has room: allocators leave some of a device unused.

    The last two stages may be without blocks: they hold the head and the loss.
    """
    if min(job.stage_blocks[:-2], default=1) == 0:
        return False
    return fullest_bytes(job) <= job.machine.memory_bytes * job.machine.constants.usable


def fullest_bytes(job: Job) -> float:
    """Bytes of the fullest rank: the first, with most micro-batches in flight, or the last, with the logits."""
    return max(sum(_rank(job, rank).values()) for rank in {0, job.layout.pp - 1})


def _rank(job: Job, rank: int) -> dict[str, float]:
    layout, c, engine = job.layout, job.machine.constants, job.engine
    params, shards = _params(job, rank), layout.shards
    weights = params * WIDTH / (shards if layout.zero >= 3 else 1)
    gradients = params * engine.grad_bytes / (shards if layout.zero >= 2 else 1)
    optimizer = params * OPTIMIZER_BYTES / (shards if layout.zero >= 1 else 1)
    logits = 0.0
    if rank == layout.pp - 1:
        logits = job.tokens * vocab_rows(job.model, layout.tp) * c.logit_bytes
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": (1.0 if engine.fused else c.kept) * _activations(job, rank),
        "logits": logits,
        "buffers": c.buffers_gib * 2**30 + _buffers(job),
    }


def _params(job: Job, rank: int) -> int:
    embedding, block, head = local_params(job.model, job.layout.tp)
    first, last = rank == 0, rank == job.layout.pp - 1
    params = sum(job.stage_blocks[rank :: job.layout.pp]) * block + embedding * first + head * last
    if last and not first and job.model.tied_embeddings:
        params += vocab_rows(job.model, job.layout.tp) * job.model.d_model
    return params


def _buffers(job: Job) -> float:
    """ZeRO-3 holds the block at work and the next one whole, and a block's gradients."""
    if job.layout.zero < 3:
        return 0.0
    block = local_params(job.model, job.layout.tp)[1]
    return block * (2 * WIDTH + job.engine.grad_bytes)


def _activations(job: Job, rank: int) -> float:
    layout = job.layout
    block, whole = block_bytes(job), job.tokens * job.model.d_model * WIDTH
    blocks = sum(job.stage_blocks[rank :: layout.pp])
    in_flight: float = min(layout.pp - rank, layout.micro_batches)
    if layout.virtual > 1:
        full = layout.pp * (1 + (layout.pp - 1) / (layout.pp * layout.virtual)) - rank / layout.virtual
        in_flight = min(full, layout.micro_batches)
    if layout.recompute == "full":
        kept = whole / (layout.tp if layout.sequence_parallel else 1)
        return blocks * kept * in_flight + block
    return blocks * block * in_flight


def block_bytes(job: Job) -> float:
    """What a block and a micro-batch keep for the backward pass, without full recompute."""
    layout, model, engine = job.layout, job.model, job.engine
    stream, local = _kept(model, layout.tp)
    if engine.dropout:
        stream += model.d_model  # two masks of a byte each, as 16-bit numbers
    numbers = stream / (layout.tp if layout.sequence_parallel else 1) + local
    if engine.async_tp and layout.sequence_parallel and layout.pp == 1:  # with a pipeline they were not seen
        numbers += 2 * model.d_model * (1 - 1 / layout.tp)  # the gathered inputs of both column-parallel matrices
    total = job.tokens * WIDTH * numbers
    if not engine.flash and layout.recompute == "none":
        heads = max(1, model.n_heads // layout.tp)
        total += job.tokens * model.seq_len * heads * (5 if engine.dropout else 2)
    return total


@cache
def _kept(model: ModelConfig, tp: int) -> tuple[float, float]:
    """Numbers of a token that a block keeps: of the residual stream and norms, and of what the tensor axis cuts."""
    kept = [k for k in layers_of(model)[1].kept if "probabilities" not in k.what]
    stream = [k for k in kept if k.ways == 1]
    return kept_numbers(stream, 1, 1), kept_numbers([k for k in kept if k.ways != 1], tp, 1)
