"""What a run has of each parameter, by key, whichever ZeRO stage holds it: read, and written back.

"weight" is the fp32 weight; the optimizer's moments and statistics and the average have their own keys
(optim/rules.py). Values are this rank's tensor-parallel part (`place_of`), without padding and unsharded over the
data axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor

from megagpt.checkpoint.pieces import AVERAGE, WEIGHT
from megagpt.optim.mesh_optimizer import MeshOptimizer
from megagpt.optim.rules import rule_of, statistic_shape
from megagpt.train.step.named import Named
from megagpt.train.step.segments import Segment

if TYPE_CHECKING:
    from megagpt.train.step.engine import Engine

SKIPPED = "skipped_steps"
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's names


def kept(engine: Engine) -> dict[str, list[Named]]:
    """The parameters that there is something of under each key, in the order of the model; weights first."""
    found = {WEIGHT: engine.parameters}
    for named in engine.parameters:
        rule = rule_of(named.declared, engine.config.optim)
        for key in (*rule.moments, *rule.statistics):
            found.setdefault(key, []).append(named)
    return found


def read(engine: Engine, named: Named, key: str) -> Tensor:
    """What there is of one parameter under a key.

    Comm: with ZeRO, an all-reduce over the data axis: every rank of it must call this.
    """
    if key in _statistics(engine):
        return _statistics(engine)[key][named.name]
    segment = engine.segments.of[named.name]
    whole = engine.segments.whole(segment, _values(engine, segment, key).detach())
    return named.part.unpadded(whole).contiguous()


def write(engine: Engine, named: Named, key: str, value: Tensor) -> None:
    """Set what `read` gives (of a weight also the low-precision copy that the model computes with). Comm: none."""
    if key in _statistics(engine):
        _statistics(engine)[key][named.name].copy_(value)
        return
    segment = engine.segments.of[named.name]
    local = torch.zeros(segment.shape, dtype=torch.float32, device=value.device)
    named.part.unpadded(local).copy_(value)
    segment.of(_values(engine, segment, key).detach()).copy_(segment.cut(local))
    if key == WEIGHT:
        _refresh(named.parameter, segment, local)


def create_moments(engine: Engine) -> None:
    """Make all that is kept exist before the first step: moments as zeros, the average as the weights.

    So memory is taken at the start, and a checkpoint has a place to be loaded into.
    """
    for master, segments in engine.segments.masters.items():
        rule = rule_of(segments[0].named.declared, engine.config.optim)
        state: dict[str, Any] = {key: torch.zeros_like(master, dtype=torch.float32) for key in rule.moments}
        if AVERAGE in state:
            state[AVERAGE].copy_(master.detach())
        if "step" not in engine.base_optimizer.param_groups[0]:  # apex counts in the group, torch by tensor
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        engine.base_optimizer.state[master] = state
        for key in rule.statistics:
            tensors = _statistics(engine).setdefault(key, {})
            for segment in segments:
                shape = statistic_shape(key, segment.named.part.shape)
                assert shape is not None, key
                tensors[segment.named.name] = torch.zeros(shape, device=master.device)


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


def _statistics(engine: Engine) -> dict[str, dict[str, Tensor]]:
    return engine.base_optimizer.statistics if isinstance(engine.base_optimizer, MeshOptimizer) else {}


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
