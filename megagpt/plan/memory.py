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

from dataclasses import dataclass

from megagpt.config import ModelConfig, ParallelConfig, RunConfig
from megagpt.config.kernels import attention_runs
from megagpt.inventory.factorised_sizes import mlp_kept_width
from megagpt.inventory.optimizer_sizes import state_bytes
from megagpt.inventory.sizes import layer_sizes

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GRADIENT_BYTES = {"fp32": 4, "bf16": 4, "fp16": 2}  # bf16 gradients accumulate in fp32


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a stage. host: optimizer states that offload keeps elsewhere, not in `total`."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(
    config: RunConfig,
    dp: int,
    *,
    zero_stage: int,
    stage: int,
    n_blocks: int,
    params_local: int,
    vocab_local: int,
    in_flight: int,
) -> Memory:
    """Memory of one rank of stage number `stage`, which holds `n_blocks` blocks and `params_local` elements.

    zero_stage: the one in use.
    in_flight: micro-batches whose activations are kept at the peak (1F1B: pp - stage, at most all of them).
    """
    precision = config.train.precision
    states = _optimizer_bytes(config, zero_stage, n_blocks, params_local) // (dp if zero_stage >= 1 else 1)
    is_last = stage == config.parallel.pp - 1
    tokens = config.train.micro_batch_size * config.model.seq_len
    return Memory(
        weights=params_local * WEIGHT_BYTES[precision] // (dp if zero_stage >= 3 else 1),
        gradients=params_local * GRADIENT_BYTES[precision] // (dp if zero_stage >= 2 else 1),
        optimizer=0 if config.parallel.offload_optimizer else states,
        activations=tokens * _activation_bytes_per_token(config, n_blocks, in_flight, is_last),
        logits=tokens * _logit_bytes(config) * vocab_local if is_last else 0,
        host=states if config.parallel.offload_optimizer else 0,
    )


def micro_batches_in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """The most micro-batches run forward and not yet backward under 1F1B (Narayanan et al. 2021)."""
    return min(parallel.pp - stage, micro_batches)


def _optimizer_bytes(config: RunConfig, zero_stage: int, n_blocks: int, params_local: int) -> int:
    """What the optimizer keeps, and an fp32 master if weights are narrower or ZeRO splits them; before it is split."""
    has_master = config.train.precision != "fp32" or zero_stage >= 1
    of_blocks = n_blocks * layer_sizes(config.model, config.parallel.tp)[1].params_local
    return state_bytes(config.optim, params_local, of_blocks) + 4 * has_master * params_local


def _logit_bytes(config: RunConfig) -> int:
    """Of one logit. Its gradient is written over it; a pipeline's buffer holds those of the micro-batch before too."""
    return WEIGHT_BYTES[config.train.precision] * (2 if config.parallel.pp > 1 else 1)


def _activation_bytes_per_token(config: RunConfig, n_blocks: int, in_flight: int, is_last: bool) -> int:
    model, tp = config.model, config.parallel.tp
    width = WEIGHT_BYTES[config.train.precision]
    D = model.d_model
    streams = {"sequential": 4, "parallel": 2, "parallel_two_norms": 3}[model.block]
    block = streams * D + _attention_numbers(config) + _mlp_numbers(model, tp)
    if config.parallel.recompute:
        kept, at_once = n_blocks * D, block  # each block's input, and the block that is being recomputed
    else:
        kept, at_once = n_blocks * block, 0
    if is_last:
        at_once += 2 * D  # input and output of the final norm
    else:
        kept += D  # the output that was sent on
    return width * (kept * in_flight + at_once)


def _attention_numbers(config: RunConfig) -> int:
    """Kept of a token in a block: q, k, v and the output; probabilities where they are stored."""
    model, tp = config.model, config.parallel.tp
    I = model.n_heads * model.head_width // tp  # noqa: E741
    J = max(model.kv_heads // tp, 1) * model.head_width
    choice, dropping = config.train.kernels["attention"], model.dropout_attention > 0
    in_steps = attention_runs(choice, model.position, dropping) in ("softmax", "reference")
    kept = 2 * I + 2 * J + (in_steps + dropping) * model.n_heads * model.seq_len // tp
    if model.position == "transformer_xl":
        # The query twice, with two biases; the positions before and after their projection, once a micro-batch.
        kept += 2 * I + model.d_model // config.train.micro_batch_size
    return kept


def _mlp_numbers(model: ModelConfig, tp: int) -> int:
    """Kept of a token in a block: the hidden before (twice with a gate) and after its activation, factors' middles."""
    return (3 if model.gated else 2) * model.ff_width // tp + mlp_kept_width(model, tp)
