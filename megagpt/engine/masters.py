"""fp32 weights, moments and averages by parameter, whichever ZeRO stage holds them: read, and written back.

Values are this rank's tensor-parallel part, without padding and unsharded over the data axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor

from megagpt.checkpoint.pieces import WEIGHT
from megagpt.engine.named import Named
from megagpt.engine.optimizers.adafactor import statistic_shape
from megagpt.engine.optimizers.mesh_optimizer import MeshOptimizer
from megagpt.engine.optimizers.rules import rule_of
from megagpt.engine.segments import Segment

if TYPE_CHECKING:
    from megagpt.engine.engine import Engine

SKIPPED = "skipped_steps"
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's names


def read(engine: Engine, named: Named, key: str) -> Tensor:
    """The fp32 weight (key "weight"), a moment or the average of one parameter.

    Comm: with ZeRO, an all-reduce over the data axis: every rank of it must call this.
    """
    segment = engine.segments.of[named.name]
    whole = engine.segments.whole(segment, _values(engine, segment, key).detach())
    return named.part.unpadded(whole).contiguous()


def write(engine: Engine, named: Named, key: str, value: Tensor) -> None:
    """Set the fp32 weight (and the low-precision copy that the model computes with) or a moment. Comm: none."""
    segment = engine.segments.of[named.name]
    local = torch.zeros(segment.shape, dtype=torch.float32, device=value.device)
    named.part.unpadded(local).copy_(value)
    segment.of(_values(engine, segment, key).detach()).copy_(segment.cut(local))
    if key == WEIGHT:
        _refresh(named.parameter, segment, local)


def create_moments(engine: Engine) -> None:
    """Make the moments exist before the first step, as zeros: memory is taken at the start, and checkpoints have a
    place to be loaded into.
    """
    for master, segments in engine.segments.masters.items():
        rule = rule_of(segments[0].named, engine.config.optim)
        state: dict[str, Any] = {key: torch.zeros_like(master, dtype=torch.float32) for key in rule.moments}
        if "step" not in engine.base_optimizer.param_groups[0]:  # apex counts in the group, torch by tensor
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        engine.base_optimizer.state[master] = state
        for key in rule.statistics:
            assert isinstance(engine.base_optimizer, MeshOptimizer)
            kept = engine.base_optimizer.statistics.setdefault(key, {})
            for segment in segments:
                shape = statistic_shape(key, segment.named.part.shape)
                kept[segment.named.name] = torch.zeros(shape, device=master.device)


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


def _values(engine: Engine, segment: Segment, key: str) -> Tensor:
    return segment.master if key == WEIGHT else engine.base_optimizer.state[segment.master][key]


def _refresh(parameter: Any, segment: Segment, local: Tensor) -> None:
    """Set what the model computes with, beside the fp32 weight where there are two. local: with padding."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(local)
        return
    shard = parameter.ds_tensor  # ZeRO 3: this rank's equal share, the last one padded
    shard.data.view(-1).narrow(0, 0, segment.length).copy_(segment.cut(local))
    if parameter.numel() == local.numel():  # a small one, which DeepSpeed keeps whole between steps
        parameter.data.copy_(local)
