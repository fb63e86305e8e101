"""Steps, batches, precision, seeds, and the engine's own file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from megagpt.config.checks import positive, require
from megagpt.config.kernels import Kernels
from megagpt.errors import UserError

MAX_INCREMENTS = 10_000  # of a batch or a sequence length: each is a row of the schedule


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
    """Tokens of a sequence at the first step, growing to model.seq_len; the rest of a sample is left out."""
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
        self._check_ramps()
        require(
            0 <= self.seed < 2**32,
            f"train.seed={self.seed}",
            "must be between 0 and 2^32 - 1",
            "1234 is the default",
        )

    def _check_ramps(self) -> None:
        """What batch ramp, batch steps and sequence length warm-up need to be whole."""
        size, start = self.global_batch_size, self.batch_ramp_start
        ramp = [self.batch_ramp_start, self.batch_ramp_tokens]
        got = f"train.batch_ramp_start={start}, batch_ramp_tokens={self.batch_ramp_tokens}"
        is_whole = None not in ramp or (ramp == [None, None] and self.batch_ramp_increment is None)
        require(is_whole, got, "belong together", "give both, or none of the batch_ramp settings")
        if start is not None:
            increment = self.batch_ramp_increment or start
            require(
                start < size, f"train.batch_ramp_start={start}", f"is not below global_batch_size={size}", "lower it"
            )
            above = start + -(-(size - start) // increment) * increment
            require(
                above == size,
                f"train.batch_ramp_increment={increment} from {start}",
                f"does not reach global_batch_size={size}",
                f"use --global-batch-size {above}, or another increment",
            )
            n = (size - start) // increment
            most = "use a larger increment"
            require(n <= MAX_INCREMENTS, f"train.batch_ramp_increment={increment}", f"makes {n:,} of them", most)
            require(not self.batch_steps, got, "cannot go with batch_steps", "give one of them")
        if self.batch_steps:
            last = list(batch_sizes(self.batch_steps).values())[-1]
            got = f"train.batch_steps={self.batch_steps!r}"
            require(last == size, got, f"must end with global_batch_size={size}", f"use --global-batch-size {last}")
        require(
            (self.seq_len_start is None) == (self.seq_len_warmup_steps is None),
            f"train.seq_len_start={self.seq_len_start}, seq_len_warmup_steps={self.seq_len_warmup_steps}",
            "belong together",
            "give both, or none",
        )


def batch_sizes(text: str) -> dict[int, int]:
    """Sequences by the first step, counted from 1, that has so many: "256@1,512@50001".  Raises UserError."""
    found: dict[int, int] = {}
    example = "write 256@1,512@50001: growing sizes, the first from step 1 on"
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9][0-9]{0,17})@([1-9][0-9]{0,17})\s*", part)
        if match is None:
            raise UserError(f"train.batch_steps={text!r} has {part!r}, which is no SIZE@STEP; {example}")
        size, step = int(match[1]), int(match[2])
        grows = not found or (step > max(found) and size > max(found.values()))
        require(grows, f"train.batch_steps={text!r}", f"does not grow at {part!r}", example)
        found[step] = size
    require(1 in found, f"train.batch_steps={text!r}", "does not say what step 1 has", example)
    return found
