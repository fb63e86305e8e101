"""Steps, batches, precision, seeds, and the engine's own file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from megagpt.config.checks import positive, require
from megagpt.kernels import Kernels


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, batches, precision, seeds, and the engine's own file."""

    train_steps: Annotated[int, arg(aliases=["--train-steps"])] = 500
    """Optimizer steps of the whole run."""
    micro_batch_size: Annotated[int, arg(aliases=["--micro-batch-size"])] = 2
    """Sequences that one process handles at a time."""
    global_batch_size: Annotated[int, arg(aliases=["--global-batch-size"])] = 8
    """Sequences in one optimizer step, over all processes."""
    batch_ramp_start: int | None = None
    """Sequences of the first steps, from which the batch grows linearly in tokens to global_batch_size."""
    batch_ramp_tokens: int | None = None
    """Tokens within which it grows."""
    batch_ramp_increment: int | None = None
    """Sequences that it grows by at a time; default batch_ramp_start."""
    batch_steps: str = ""
    """Sequences by step, such as 256@1,512@50001: from step 1, from step 50001; the last one is global_batch_size."""
    seq_len_start: int | None = None
    """Tokens of a sequence at the first step, from which they grow to model.seq_len."""
    seq_len_warmup_steps: int | None = None
    """Steps within which they grow."""
    seq_len_increment: int = 8
    """Tokens that they grow by at a time."""
    precision: Annotated[Literal["fp32", "bf16", "fp16"], arg(aliases=["--precision"])] = "fp32"
    """Number format of weights and activations; optimizer states stay fp32."""
    kernels: Annotated[str, arg(aliases=["--kernels"])] = "auto"
    """auto | cuda | cpu | reference (plain PyTorch), with exceptions by op: auto,softmax=reference. For attention:
    auto,attention=sdpa (torch's scaled_dot_product_attention) | flex (its FlexAttention) | softmax (steps around the
    fused softmax) | reference."""
    seed: Annotated[int, arg(aliases=["--seed"])] = 1234
    """Seed of weights, dropout and data order."""
    deepspeed_config: Annotated[str | None, arg(aliases=["--deepspeed_config", "--deepspeed-config"])] = None
    """A DeepSpeed JSON for whatever megagpt does not own."""

    def __post_init__(self) -> None:
        positive(
            "train",
            self,
            *("train_steps", "micro_batch_size", "global_batch_size", "batch_ramp_start", "batch_ramp_tokens"),
            *("batch_ramp_increment", "seq_len_start", "seq_len_warmup_steps", "seq_len_increment"),
        )
        Kernels.parse(self.kernels)  # raises
        require(
            0 <= self.seed < 2**32,
            f"train.seed={self.seed}",
            "must be between 0 and 2^32 - 1",
            "1234 is the default",
        )
