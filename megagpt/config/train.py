"""Steps, batches, precision, seeds, and the engine's own file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megagpt.config.checks import parsed, paths, positive
from megagpt.config.kernels import Kernels
from megagpt.config.values import BatchSteps, Short
from megagpt.errors import require

_SIZE, _STEPS = "train.global_batch_size", "train.batch_steps"
MAX_INCREMENTS = 10_000  # of a batch or a sequence length: each is a row of the schedule


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, batches, precision, seeds, and the engine's own file."""

    train_steps: Short[int] = 500
    """Optimizer steps of the whole run."""
    micro_batch_size: Short[int] = 2
    """Sequences that one process handles at a time."""
    global_batch_size: Short[int] = 8
    """Sequences in one optimizer step, over all processes."""
    batch_ramp_start: int | None = None
    """Sequences of the first steps, from which the batch grows linearly in tokens to global_batch_size."""
    batch_ramp_tokens: int | None = None
    """Tokens within which it grows."""
    batch_ramp_increment: int | None = None
    """Sequences that it grows by at a time; default batch_ramp_start."""
    batch_steps: BatchSteps = BatchSteps()
    """Sequences by step, such as 256@1,512@50001: from step 1, from step 50001; the last one is global_batch_size."""
    seq_len_start: int | None = None
    """Tokens of a sequence at the first step, growing to model.seq_len; the rest of a sample is left out."""
    seq_len_warmup_steps: int | None = None
    """Steps within which they grow."""
    seq_len_increment: int = 8
    """Tokens that they grow by at a time."""
    precision: Short[Literal["fp32", "bf16", "fp16"]] = "fp32"
    """Number format of weights and activations; optimizer states stay fp32."""
    kernels: Short[Kernels] = Kernels()
    """auto | cuda | cpu | reference (plain PyTorch), with exceptions by op: auto,softmax=reference. For attention:
    auto,attention=sdpa (torch's scaled_dot_product_attention) | flex (its FlexAttention) | softmax (steps around the
    fused softmax) | blocks (these, by blocks of queries: memory linear in the context) | reference."""
    seed: Short[int] = 1234
    """Seed of weights, dropout and data order."""
    deepspeed_config: Short[str | None] = None
    """A DeepSpeed JSON for whatever megagpt does not own."""

    def __post_init__(self) -> None:
        positive(
            "train",
            self,
            *("train_steps", "micro_batch_size", "global_batch_size", "batch_ramp_start", "batch_ramp_tokens"),
            *("batch_ramp_increment", "seq_len_start", "seq_len_warmup_steps", "seq_len_increment"),
        )
        parsed(self, "kernels", Kernels)
        parsed(self, "batch_steps", BatchSteps)
        paths(self, "deepspeed_config")
        self._check_ramps()
        require(
            0 <= self.seed < 2**32,
            f"train.seed={self.seed}",
            "must be between 0 and 2^32 - 1",
            "1234 is the default",
            "train.seed",
        )

    def _check_ramps(self) -> None:
        """What batch ramp, batch steps and sequence length warm-up need to be whole."""
        ramp, size = [self.batch_ramp_start, self.batch_ramp_tokens], self.global_batch_size
        got = f"train.batch_ramp_start={ramp[0]}, batch_ramp_tokens={ramp[1]}"
        keys = ("train.batch_ramp_start", "train.batch_ramp_tokens", "train.batch_ramp_increment")
        is_whole = None not in ramp or (ramp == [None, None] and self.batch_ramp_increment is None)
        require(is_whole, got, "belong together", "give both, or none of the batch_ramp settings", *keys)
        if self.batch_ramp_start is not None:
            require(not self.batch_steps, got, "cannot go with batch_steps", "give one of them", *keys, _STEPS)
            self._check_increments(self.batch_ramp_start, *keys)
        if self.batch_steps:
            last, got = max(self.batch_steps.values()), f"{_STEPS}='{self.batch_steps}'"
            wanted, remedy = f"must end with global_batch_size={size}", f"use --global-batch-size {last}"
            require(last == size, got, wanted, remedy, _STEPS, _SIZE)
        require(
            (self.seq_len_start is None) == (self.seq_len_warmup_steps is None),
            f"train.seq_len_start={self.seq_len_start}, seq_len_warmup_steps={self.seq_len_warmup_steps}",
            "belong together",
            "give both, or none",
            *("train.seq_len_start", "train.seq_len_warmup_steps"),
        )

    def _check_increments(self, start: int, *keys: str) -> None:
        """Whether the ramp leads from start to the whole batch."""
        size, increment = self.global_batch_size, self.batch_ramp_increment or start
        got, lower = f"train.batch_ramp_start={start}", f"is not below global_batch_size={size}"
        require(start < size, got, lower, "lower it", *keys, _SIZE)
        n = -(-(size - start) // increment)
        got, above = f"train.batch_ramp_increment={increment}", start + n * increment
        wanted = f"does not reach global_batch_size={size}"
        remedy = f"use --global-batch-size {above}, or another increment"
        require(above == size, f"{got} from {start}", wanted, remedy, *keys, _SIZE)
        require(n <= MAX_INCREMENTS, got, f"makes {n:,} of them", "use a larger increment", *keys, _SIZE)
