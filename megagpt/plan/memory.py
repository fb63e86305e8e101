"""What one rank of a stage keeps in memory, by formula, to be compared with the measured peak.

Parameters, gradients, optimizer: Rajbhandari et al. 2020 (ZeRO), section 3.
Activations: Korthikanti et al. 2022, section 4. Their 34 s b h bytes a layer in 16 bits are here
w (4 D + 4 I/t + 2 F/t) a token (3 F/t with a gate), 32 D with I = D, F = 4 D, t = 1, w = 2; the other 2 are the
masks of residual dropout, which megagpt recomputes and does not store. Their 5 a s² b, the attention probabilities
before and after dropout and a mask, are 2 w H T/t a token, and only with attention dropout (1 w H T/t with ALiBi or
relative positions alone): flash attention keeps no probabilities. Shared keys make 2 I/t + 2 J/t of 4 I/t, a block
with one norm 2 D of 4 D, with two beside each other 3 D.
Not counted: the framework itself, communication and all-gather buffers, fragmentation, the data, masks of patterns, and
what a butterfly's levels are multiplied into.

Letters: D d_model, I n_heads * d_head, J n_kv_heads * d_head, F d_ff, H n_heads, T seq_len, t tensor parallel size,
w bytes of one number of the precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.config import ParallelConfig, RunConfig
from megagpt.inventory.layers import Layer, vocab_local
from megagpt.inventory.parameter import Parameter, kept_numbers
from megagpt.optim.rules import kept_by_optimizer

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GRADIENT_BYTES = {"fp32": 4, "bf16": 4, "fp16": 2}  # bf16 gradients accumulate in fp32


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a stage. host: optimizer states that offload keeps elsewhere, not in `total`.

    start: the most before the optimizer has its states. From then on there is less than in a step.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    host: int
    start: int

    @property
    def total(self) -> int:
        """Bytes on the device at the peak, which is in a step nearly always."""
        return max(self.start, self.weights + self.gradients + self.optimizer + self.activations + self.logits)


def estimate_memory(
    config: RunConfig,
    dp: int,
    *,
    zero_stage: int,
    layers: Sequence[Layer],
    held: Sequence[Parameter],
    in_flight: int,
) -> Memory:
    """Memory of one rank of the stage that computes `layers`.

    held: their parameters, and copies of other stages' that the stage keeps; the frozen ones have weights alone.
    zero_stage: the one in use.
    in_flight: micro-batches whose activations are kept at the peak (1F1B: pp - stage, at most all of them).
    """
    precision, tp = config.train.precision, config.parallel.tp
    params, width = sum(p.local_size(tp) for p in held), WEIGHT_BYTES[precision]
    learning = [p for p in held if p.trained]
    n_learning, shards = sum(p.local_size(tp) for p in learning), dp if zero_stage >= 3 else 1
    weights = params * width // shards
    largest = max(p.local_size(tp) for p in held) * width
    states = _optimizer_bytes(config, zero_stage, learning) // (dp if zero_stage >= 1 else 1)
    tokens = config.train.micro_batch_size * config.model.seq_len
    return Memory(
        weights=weights,
        gradients=n_learning * GRADIENT_BYTES[precision] // (dp if zero_stage >= 2 else 1),
        optimizer=0 if config.parallel.offload_optimizer else states,
        activations=tokens * _activation_bytes_per_token(config, layers, in_flight),
        logits=tokens * _logit_bytes(config, layers[-1]),
        host=states if config.parallel.offload_optimizer else 0,
        start=weights + _start_bytes(zero_stage, n_learning * width // shards, largest),
    )


def _start_bytes(zero_stage: int, learning: int, largest: int) -> int:
    """Beside the weights: ZeRO lays those that it trains end to end, with both copies while it does; ZeRO 3 shards
    them, whole one at a time.
    """
    if zero_stage == 0:
        return 0
    return learning if zero_stage < 3 else max(learning, largest)


def micro_batches_in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """The most micro-batches run forward and not yet backward under 1F1B (Narayanan et al. 2021)."""
    return min(parallel.pp - stage, micro_batches)


def _optimizer_bytes(config: RunConfig, zero_stage: int, held: Sequence[Parameter]) -> int:
    """What the optimizer keeps, and an fp32 master if weights are narrower or ZeRO splits them; before it is split."""
    has_master = config.train.precision != "fp32" or zero_stage >= 1
    return sum(4 * (kept_by_optimizer(p, config.optim) + has_master) * p.local_size(config.parallel.tp) for p in held)


def _logit_bytes(config: RunConfig, last: Layer) -> int:
    """Of a token's logits on the last stage. A logit's gradient is written over it; a pipeline's buffer holds those of
    the micro-batch before too.
    """
    if last.name != "head":
        return 0
    width = WEIGHT_BYTES[config.train.precision] * (2 if config.parallel.pp > 1 else 1)
    return width * vocab_local(config.model, config.parallel.tp)


def _activation_bytes_per_token(config: RunConfig, layers: Sequence[Layer], in_flight: int) -> int:
    D, tp, micro = config.model.d_model, config.parallel.tp, config.train.micro_batch_size
    numbers = {layer.name: kept_numbers(layer.kept, tp, micro) for layer in layers}
    blocks = [n for name, n in numbers.items() if name.startswith("blocks.")]
    if config.parallel.recompute:
        kept, at_once = len(blocks) * D, max(blocks)  # each block's input, and the block that is being recomputed
    else:
        kept, at_once = sum(blocks), 0
    if "head" in numbers:
        at_once += numbers["head"]
    else:
        kept += D  # the output that was sent on
    return WEIGHT_BYTES[config.train.precision] * (kept * in_flight + at_once)
