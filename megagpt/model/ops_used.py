"""Which implementation each op of a model's training takes, and why: checked before the start, shown at the start."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from megagpt.errors import UserError
from megagpt.inventory.attention import attention_lacks, attention_runs
from megagpt.model.attention import IMPLEMENTATIONS
from megagpt.model.position import POSITIONS
from megagpt.ops.library import declare, has_kernel, kernel_status, op_names

if TYPE_CHECKING:
    from megagpt.config import ModelConfig
    from megagpt.config.kernels import Kernels
    from megagpt.model.attention.implementation import Implementation


class Status(NamedTuple):
    """One line of the start-up table."""

    op: str
    runs: str
    why: str


def ops_used(config: ModelConfig, kernels: Kernels) -> list[str]:
    """The ops of megagpt/ops that training such a model calls."""
    attention_drops = config.dropout_attention > 0
    runs = _runs(config, kernels)
    ops = ["norm", "activation", "bias_dropout_add", "cross_entropy"]
    ops += ["softmax"] if any(implementation.softmax for implementation in runs) else []
    ops += ["dropout"] if attention_drops or config.dropout_embedding > 0 else []
    return [*ops, *POSITIONS[config.position].ops]


def attention_status(config: ModelConfig, kernels: Kernels) -> Status:
    """Which attention runs in training, and why: for the start-up table."""
    choice, dropout = kernels["attention"], config.dropout_attention
    titles = " and ".join(implementation.title for implementation in _runs(config, kernels))
    lacks = attention_lacks("sdpa", config.position, dropout)
    why = f"torch's has no {lacks}" if lacks else "has all that is needed"
    return Status("attention", titles, why if choice == "auto" else "asked for")


def _runs(config: ModelConfig, kernels: Kernels) -> list[Implementation]:
    """Those of all layers, in training."""
    choice, drops = kernels["attention"], config.dropout_attention > 0
    names = dict.fromkeys(attention_runs(choice, config, layer, drops) for layer in range(config.n_layers))
    return [IMPLEMENTATIONS[name] for name in names]


def check_kernels(kernels: Kernels, ops: Sequence[str], device: str) -> None:
    """Raise UserError for an op that does not exist, or a kernel of one of `ops` that is insisted on and not there."""
    names = ["attention", *op_names()]
    for op, _ in kernels.exceptions:
        if op not in names:
            near = difflib.get_close_matches(op, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names))}"
            raise UserError(f"train.kernels names the op {op}, which does not exist; {hint}")
    if kernels["attention"] == "flex" and device == "cpu":
        raise UserError(
            "train.kernels has attention=flex, but torch's FlexAttention cannot train on the cpu (it has no backward "
            "pass there); use attention=auto"
        )
    declare(ops)
    for op in ops:
        choice = kernels[op]
        if choice not in ("cpu", "cuda"):
            continue
        if choice != device:
            raise UserError(f"train.kernels={choice} for {op}, but this run is on the {device}; use auto or {device}")
        if not has_kernel(op, device):
            _, why = kernel_status(op, device, choice)
            raise UserError(f"train.kernels={choice} for {op}: {why}; or use --kernels auto")


def kernel_rows(kernels: Kernels, ops: Sequence[str], device: str) -> list[Status]:
    """A row for each of `ops`."""
    declare(ops)
    return [Status(op, *kernel_status(op, device, kernels[op])) for op in ops]
