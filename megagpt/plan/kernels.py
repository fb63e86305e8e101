"""What the kernels of a block, and of the head, take on one rank: seconds by kind, forward and backward. No torch.

Matrix products: FLOPs over the rate that their shape lets them reach, or their bytes over the bandwidth, whichever is
more. A product (m, k) x (k, n) fills the multiprocessors in waves of 128 x 128 tiles, and needs some inner dim k to get
going. Elementwise kernels: their bytes over the bandwidth.
Letters: D d_model, I n_heads * d_head, J n_kv_heads * d_head, F d_ff, V vocabulary, T seq_len.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from megagpt.config import ModelConfig
from megagpt.plan.job import Job, layers_of, local_params, vocab_rows
from megagpt.plan.machine import Machine
from megagpt.plan.network import all_reduce_s, axis_groups, gather_s, stages_share_node

KINDS = ("matrix", "attention", "memory", "tensor", "context", "host")
WIDTH = 2  # bytes of an activation
_TILE = 128


@dataclass(frozen=True)
class Times:
    """Seconds by kind: matrix products, attention, memory-bound kernels; exposed communication of the tensor and the
    context axis; waiting for the host.
    """

    matrix: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    host: float = 0.0

    def __add__(self, other: Times) -> Times:
        return Times(*(getattr(self, kind) + getattr(other, kind) for kind in KINDS))

    def __mul__(self, factor: float) -> Times:
        return Times(*(getattr(self, kind) * factor for kind in KINDS))

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(getattr(self, kind) for kind in KINDS)


def smooth_max(a: float, b: float) -> float:
    """What two that run beside each other take: the longer, and some more where they are alike."""
    return 0.0 if a <= 0 and b <= 0 else math.hypot(a * a, b * b) ** 0.5


def block_times(job: Job) -> tuple[Times, Times]:
    """Of a block and a micro-batch: forward, and backward with what is recomputed."""
    forward, backward = _matrix(job), _matrix(job, backward=True)
    attention, attention_back = _attention(job)
    memory, memory_back = _elementwise(job)
    tensor, tensor_back = _tensor(job, forward), _tensor(job, backward)
    context = _context(job, attention)
    host = _host_s(job)
    ahead = _waiting(Times(forward, attention, memory, tensor, context), host)
    back = Times(backward, attention_back, memory_back + _accumulation(job), tensor_back, 2 * context)
    recompute = job.layout.recompute
    if recompute == "selective" and not job.engine.flash:
        back += Times(attention=attention)
    back = _waiting(back, host)
    return ahead, back + ahead if recompute == "full" else back


def head_times(job: Job) -> tuple[Times, Times]:
    """Of the output matrix and the loss. Logits are made in 16 bits and their loss taken in 32."""
    model, m = job.model, job.tokens
    rows = vocab_rows(model, job.layout.tp)
    product = matmul_s(m, rows, model.d_model, job.machine)
    back = matmul_s(m, model.d_model, rows, job.machine) + matmul_s(rows, model.d_model, m, job.machine)
    traffic = 1.0 if job.engine.fused else job.machine.constants.traffic
    passes = m * rows * 10 * traffic / _reached(job.machine)
    return Times(matrix=product, memory=passes), Times(matrix=back, memory=passes)


def matmul_s(m: int, n: int, k: int, machine: Machine, fp8: bool = False) -> float:
    """Seconds of a product (m, k) x (k, n)."""
    c = machine.constants
    tiles = math.ceil(m / _TILE) * math.ceil(n / _TILE) / machine.multiprocessors
    full = tiles / math.ceil(tiles)
    rate = machine.flops_fp8 * c.fp8 if fp8 else machine.flops
    rate *= c.matrix * k / (k + c.half_depth) * (0.5 + 0.5 * full)  # half of the last wave's idleness shows
    if n % 64 or k % 64:
        rate *= c.misaligned
    return max(2.0 * m * n * k / rate, WIDTH * (m * k + k * n + m * n) / _reached(machine))


@cache
def _maps(model: ModelConfig, tp: int) -> tuple[tuple[int, int], ...]:
    """(outputs, inputs) of each of a block's matrices on one of tp ranks, several that lie packed as one."""

    def local() -> Iterator[tuple[int, int]]:
        for p in layers_of(model)[1].parameters.values():
            if p.kind == "map" and len(p.shape) >= 2:
                outputs, inputs = math.prod(p.shape[:-1]), p.shape[-1]
                dim = p.dim(tp)
                cut_inputs = dim == len(p.shape) - 1
                yield (
                    outputs if dim is None or cut_inputs else math.ceil(outputs / tp),
                    math.ceil(inputs / tp) if cut_inputs else inputs,
                )

    return tuple(local())


def _matrix(job: Job, backward: bool = False) -> float:
    m, machine, fp8 = job.tokens, job.machine, job.engine.fp8
    total = 0.0
    for n, k in _maps(job.model, job.layout.tp):
        if backward:
            total += matmul_s(m, k, n, machine, fp8) + matmul_s(n, k, m, machine, fp8)
        else:
            total += matmul_s(m, n, k, machine, fp8)
    return total


def _attention(job: Job) -> tuple[float, float]:
    """Scores, probabilities and their product with the values.

    Flash attention does the causal half, 2.5 times as much backward (Dao 2023). Otherwise T² probabilities a head go
    through memory: written by the product, read and written by the softmax, by dropout, and read (13 bytes in 16 bits
    with a mask; backward 17), and both products are done in full.
    """
    model, machine, tp = job.model, job.machine, job.layout.tp
    c, T, heads = machine.constants, model.seq_len, max(1, model.n_heads // tp)
    inner = heads * model.head_width
    if job.engine.flash:
        causal = 2.0 * job.tokens * T * inner / (machine.flops * c.flash)
        return causal, 2.5 * causal
    scores = job.tokens * T * heads
    rate = machine.flops * c.matrix * model.head_width / (model.head_width + c.half_depth)
    products, reached = 4.0 * scores * model.head_width / rate, _reached(machine)
    return products + 13 * scores / reached, 2 * products + 17 * scores / reached


def _elementwise(job: Job) -> tuple[float, float]:
    """Norms, residual additions, dropout, activations, rotary positions. Backward moves twice as much."""
    model, tp, engine = job.model, job.layout.tp, job.engine
    D, F = model.d_model, model.ff_width / tp
    inner, shared = model.n_heads * model.head_width / tp, model.kv_heads * model.head_width / tp
    stream = 2 * 2 * D + 2 * 3 * D + (2 * 1.5 * D if engine.dropout else 0)  # two norms, two residual additions
    local = (5 if model.gated else 2) * F
    local += 2 * (inner + shared) if engine.flash else 2 * (2 * inner + 2 * shared)  # rotary, or transposes
    numbers = stream / (tp if job.layout.sequence_parallel else 1) + local
    traffic = 1.0 if engine.fused else job.machine.constants.traffic
    forward = job.tokens * numbers * WIDTH * traffic / _reached(job.machine)
    return forward, 2 * forward


def _accumulation(job: Job) -> float:
    """A block's gradients, added to those of the micro-batches before."""
    if job.engine.fused_wgrad or job.layout.micro_batches == 1:
        return 0.0
    size = local_params(job.model, job.layout.tp)[1] * (WIDTH + job.engine.grad_bytes)
    return size * job.machine.constants.accumulate / _reached(job.machine)


def _tensor(job: Job, beside: float) -> float:
    """Exposed communication of a pass: two all-reduces, or as much by halves. beside: matrix work that may hide it."""
    layout, machine = job.layout, job.machine
    if layout.tp == 1:
        return 0.0
    group, size = axis_groups(layout, machine)["tensor"], job.tokens * job.model.d_model * WIDTH
    whole = 4 * gather_s(size, group, machine) if layout.sequence_parallel else 2 * all_reduce_s(size, group, machine)
    hidden = machine.constants.tp_hidden if job.engine.overlap_tp else 0.0
    return whole - min(hidden * whole, beside)


def _context(job: Job, beside: float) -> float:
    """Keys and values go around the context axis while attention works on those that are there."""
    layout, model = job.layout, job.model
    if layout.cp == 1:
        return 0.0
    size = layout.cp * job.tokens * 2 * model.kv_heads * model.head_width // layout.tp * WIDTH
    whole = gather_s(size, axis_groups(layout, job.machine)["context"], job.machine)
    return max(0.0, whole - job.machine.constants.tp_hidden * beside)


def _host_s(job: Job) -> float:
    c, layout = job.machine.constants, job.layout
    us = c.host_us
    if job.engine.async_tp and layout.tp > 1:
        meet = layout.pp > 1 and not stages_share_node(layout, job.machine)
        us += c.async_host_us + (c.async_rank_us * layout.tp if meet else 0)
    return us * 1e-6


def _waiting(times: Times, host_s: float) -> Times:
    """The same, and what the device waits for the host that launches its kernels."""
    return times + Times(host=smooth_max(times.total, host_s) - times.total)


def _reached(machine: Machine) -> float:
    return machine.bandwidth * machine.constants.memory
