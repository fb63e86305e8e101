"""What trains the model beneath the engine: this rank's layers and shards, a step's passes, and what is counted.

`deepspeed/` is one; a pipeline of our own would be another file beside it. Torch only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.data.loader import MicroBatch
from megagpt.optim.segments import Elements, Segment, Segments
from megagpt.parallel.parameter import Named

SKIPPED = "skipped_steps"


@dataclass(frozen=True)
class Outcome:
    """Of one step, equal on every rank. loss: mean over all micro-batches. grad_norm: global, before clipping.

    skipped: the norm was not finite, so that the optimizer moved nothing; it may have counted the step.
    """

    loss: float
    grad_norm: float
    skipped: bool


class Backend(Protocol):
    """The model of a run, spread over the mesh, and all that happens to it in a step.

    layers: this rank's, in order, by canonical name. parameters: theirs. tied: weights that other pipeline stages have
    copies of, each with the group of those stages. Weights have no values yet: `Engine` gives them some.
    optimizer: steps the masters that `segments` describes, and optimizer_name says in the log which one it is.
    frozen: segments of what it does not step. data_replicas: whether each rank of the data axis holds all the weights
    of its layers, equal to the others'; ZeRO 3 shards them.
    """

    device: torch.device
    layers: list[tuple[str, nn.Module]]
    parameters: list[Named]
    tied: list[tuple[Tensor, ProcessGroup]]
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    segments: Segments
    frozen: list[Segment]
    data_replicas: bool

    def step(self, batches: Iterable[MicroBatch], n_sequences: int, seq_len: int) -> Outcome:
        """Forward and backward of this rank's micro-batches, the norm, clipping, and the optimizer's step.

        n_sequences: of the step, over all ranks. seq_len: of each of them.
        Comm: pipeline sends, gradient reductions, the norm, the loss.
        """
        ...

    def evaluate(self, batches: Iterable[MicroBatch], n_micro_batches: int) -> float:
        """Mean loss, in nats per token, over this rank's micro-batches of whole sequences and all data ranks.

        Comm: pipeline sends, and an all-reduce of the loss.
        """
        ...

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied with before its backward pass; 1 unless in fp16."""
        ...

    def read_counters(self) -> dict[str, float]:
        """Steps skipped (`SKIPPED`), and all that the loss scale follows from: what a checkpoint keeps."""
        ...

    def write_counters(self, counters: dict[str, float]) -> None:
        """Set what `read_counters` gave; what is not in it stays."""
        ...

    def local_weights(self, named: Named) -> list[Tensor]:
        """What this rank computes with, and thus what may be wrong on it alone; the last one is this rank's own share.

        One tensor; where ZeRO 3 shards the weights two, of which the first is empty unless it is whole just now.
        """
        ...

    def set_weight(self, segment: Segment, elements: Elements) -> None:
        """Set what the model computes with: to follow a master that was written, or of a frozen one.

        elements: of the part, with padding.
        """
        ...

    def close(self) -> None:
        """Tear down; without it some finished runs hang or abort at exit."""
        ...
