"""fp32 weights and Adam moments by parameter, whichever ZeRO stage holds them: read, and written back.

Values are this rank's tensor-parallel part, without padding and unsharded over the data axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from megagpt.checkpoint.pieces import MOMENTS, WEIGHT
from megagpt.engine.named import Named

if TYPE_CHECKING:
    from megagpt.engine.engine import Engine

SKIPPED = "skipped_steps"
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's names


def read(engine: Engine, named: Named, key: str) -> Tensor:
    """The fp32 weight (key "weight") or a moment of one parameter.

    Comm: with ZeRO, an all-reduce or all-gather over the data axis: every rank of it must call this.
    """
    parameter = named.parameter
    if not _sharded_by_zero(parameter):
        full = parameter.detach() if key == WEIGHT else engine.base_optimizer.state[parameter][key]
    elif key == WEIGHT:
        full = safe_get_full_fp32_param(parameter)
    else:
        full = safe_get_full_optimizer_state(parameter, key)
    assert full is not None, f"DeepSpeed keeps no {key} of {named.name}"
    return named.part.unpadded(full.view(_local_shape(parameter))).contiguous()


def write(engine: Engine, named: Named, key: str, value: Tensor) -> None:
    """Set the fp32 weight (and the low-precision copy that the model computes with) or a moment. Comm: none."""
    parameter = named.parameter
    local = torch.zeros(_local_shape(parameter), dtype=torch.float32, device=value.device)
    named.part.unpadded(local).copy_(value)
    if hasattr(parameter, "ds_id"):
        _write_zero_3(engine, parameter, key, local)
    elif not _sharded_by_zero(parameter):
        target = parameter.data if key == WEIGHT else engine.base_optimizer.state[parameter][key]
        target.copy_(local)
    elif key == WEIGHT:
        safe_set_full_fp32_param(parameter, local)
        parameter.data.copy_(local)
    else:
        safe_set_full_optimizer_state(parameter, local, key)


def create_moments(engine: Engine) -> None:
    """Make the moments exist before the first step, as zeros.

    So memory is taken at the start, a checkpoint can be loaded into them, and DeepSpeed's ZeRO 1 and 2, which connect
    moments to parameters after the step of the first parameter group, find those of the other groups as well.
    """
    for flat in _flat_masters(engine):
        state = {key: torch.zeros_like(flat, dtype=torch.float32) for key in MOMENTS}
        if "step" not in engine.base_optimizer.param_groups[0]:  # apex counts in the group, torch by tensor
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        engine.base_optimizer.state[flat] = state
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def read_counters(engine: Engine) -> dict[str, float]:
    """What the engine counts: steps skipped because fp16 overflowed, and all that its loss scale follows from."""
    scaler = _loss_scaler(engine)
    of_scaler = {name: getattr(scaler, name) for name in SCALER} if scaler else {}
    return {SKIPPED: engine.engine.skipped_steps, **of_scaler}


def write_counters(engine: Engine, step: int, counters: dict[str, float]) -> None:
    """Set what `read_counters` gave after `step` steps, and Adam's own count, which its bias correction needs."""
    engine.engine.skipped_steps = int(counters[SKIPPED])
    _set_adam_step(engine, step - int(counters[SKIPPED]))
    scaler = _loss_scaler(engine)
    for name in SCALER:
        if scaler and name in counters:  # a run that was not in fp16 left none
            setattr(scaler, name, counters[name])


def _loss_scaler(engine: Engine) -> DynamicLossScaler | None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if isinstance(scaler, DynamicLossScaler) else None


def _set_adam_step(engine: Engine, step: int) -> None:
    for group in engine.base_optimizer.param_groups:
        if "step" in group:
            group["step"] = step
    for state in engine.base_optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)


def _flat_masters(engine: Engine) -> Iterator[Tensor]:
    """The tensors that Adam steps on: flat shards with ZeRO, the parameters themselves without."""
    shards = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 shows them to Adam one by one
    if shards is not None:
        yield from shards
    else:
        for group in engine.base_optimizer.param_groups:
            yield from group["params"]


def _sharded_by_zero(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _local_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape on this tensor-parallel rank; ZeRO-3 leaves an empty tensor and keeps the shape beside it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _write_zero_3(engine: Engine, parameter: nn.Parameter, key: str, local: Tensor) -> None:
    # DeepSpeed's own setter narrows past the end where the data axis does not divide the size: pad, then slice.
    shard = parameter.ds_tensor  # type: ignore[attr-defined]
    padded = torch.zeros(shard.numel() * engine.mesh.data.size, dtype=torch.float32, device=local.device)
    padded[: local.numel()].copy_(local.flatten())
    mine = padded.narrow(0, shard.numel() * engine.mesh.data.rank, shard.numel())
    if key == WEIGHT:
        safe_set_local_fp32_param(parameter, mine)
        shard.data.copy_(mine.view_as(shard))
        if parameter.numel() == local.numel():  # a small one, which DeepSpeed keeps whole between steps
            parameter.data.copy_(local)
    else:
        safe_set_local_optimizer_state(parameter, mine, key)
