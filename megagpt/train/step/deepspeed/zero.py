"""Where DeepSpeed's ZeRO optimizers keep weights, masters and gradients: their private attributes, read once and here.

Their own getters and setters know moments only after a first step, and those of the first parameter group alone; and
ZeRO 3's setter reads past the end where dp does not divide a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from megagpt.optim.segments import Elements, Segment, Segments, copy_elements
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.parameter import Named, give_memory
from megagpt.train.step.grad_norm import counts


def find_segments(parameters: list[Named], optimizer: Any, mesh: Mesh, device: torch.device) -> Segments:
    """Ask DeepSpeed's optimizer, or torch's where there is no ZeRO, where the parameters are. Comm: none."""
    is_split = any(hasattr(n.parameter, "ds_id") or hasattr(n.parameter, "_hp_mapping") for n in parameters)
    return Segments.listed(_segments(parameters, optimizer, mesh), mesh.data if is_split else SINGLE, mesh, device)


def _segments(parameters: list[Named], optimizer: Any, mesh: Mesh) -> Iterator[Segment]:
    group_of = {id(p): i for i, group in enumerate(_groups_before_flattening(optimizer)) for p in group}
    for named in parameters:
        p: Any = named.parameter
        if hasattr(p, "ds_id"):  # ZeRO 3: every rank has an equal share of each parameter, the last one padded
            group, offset, share = optimizer.grad_position[optimizer.get_param_id(p)]
            start = min(mesh.data.rank * share, p.ds_numel)
            master = optimizer.fp32_partitioned_groups_flat[group]
            yield Segment(named, p.ds_shape, master, offset, start, min(share, p.ds_numel - start))
        elif hasattr(p, "_hp_mapping"):  # ZeRO 1 and 2: a group of parameters is laid end to end, and cut into shares
            (master,) = optimizer.param_groups[group_of[id(p)]]["params"]
            if p._hp_mapping is None:
                yield Segment(named, p.shape, master, 0, 0, 0)
            else:
                here, there = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                yield Segment(named, p.shape, master, here.start, there.start, here.numel)
        else:
            yield Segment.whole(named)


def frozen_segment(named: Named, mesh: Mesh) -> Segment:
    """This rank's elements of a parameter that no optimizer steps: what it computes with is its own master."""
    p: Any = named.parameter
    if not hasattr(p, "ds_id"):
        return Segment.whole(named)
    start = min(mesh.data.rank * p.ds_tensor.ds_numel, p.ds_numel)
    return Segment(named, p.ds_shape, p.ds_tensor, 0, start, min(p.ds_tensor.ds_numel, p.ds_numel - start))


def _groups_before_flattening(optimizer: Any) -> list[list[nn.Parameter]]:
    """The parameters of each group of ZeRO 1 and 2 (of which BF16_Optimizer is one); nothing for the others."""
    return getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "bf16_groups", None) or []


def local_weights(parameter: Any) -> list[Tensor]:
    """See `Backend.local_weights`. ZeRO 3 computes with small parameters whole, with others from the shards."""
    return [parameter.detach(), *([parameter.ds_tensor.detach()] if hasattr(parameter, "ds_tensor") else [])]


def set_weight(segment: Segment, elements: Elements) -> None:
    """See `Backend.set_weight`."""
    parameter: Any = segment.named.parameter
    if hasattr(parameter, "ds_id"):  # ZeRO 3: this rank's equal share, the last one padded
        copy_elements(elements, segment.start, parameter.ds_tensor.data.view(-1).narrow(0, 0, segment.length))
        parameter.ds_secondary_tensor = None  # where a JSON asks for copies within hosts: made anew when it is gathered
    if parameter.shape == segment.shape:  # with ZeRO 3 only a small one, which DeepSpeed keeps whole between steps
        copy_elements(elements, 0, parameter.data.view(-1))


class _Shards(deepspeed.zero.Init):
    """Shards parameters over the data axis before they have values, one at a time: no rank ever holds all of them.

    Its base does that to parameters with values, which it sends from one rank to all others first.
    """

    def _convert_to_zero_parameters(self, param_list: Iterable[Any]) -> None:
        for parameter in param_list:
            give_memory(parameter, self.local_device, self.dtype)
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()


def shard_at_birth(model: nn.Module, settings: dict[str, Any], mpu: Any) -> None:
    """Make the parameters of a model, which were made `empty`, those of ZeRO 3. settings: DeepSpeed's. Comm: none."""
    _Shards(module=model, config_dict_or_path=settings, data_parallel_group=mpu.get_data_parallel_group(), mpu=mpu)


def watch_uncounted(optimizer: Any, parameters: list[Named], mesh: Mesh) -> None:
    """Let DeepSpeed's ZeRO see a NaN in a gradient that its norm leaves out: of an unsharded weight, on model rank > 0.

    All ranks have the same such gradients, unless one of them computes wrongly: that one spoils a gradient that counts.
    Else its own weights alone would be poisoned (ZeRO 3, BF16_Optimizer).
    Only this rank's memory is read: no wait for the device. Comm: none.
    """
    if getattr(optimizer, "cpu_offload", False):
        # It looks at each gradient on its way to the host, and asks all ranks: none of them may stay out of that.
        optimizer.check_grad_overflow = optimizer.check_grad_overflow or mesh.model.size > 1
        return
    counted = {id(n.parameter) for n in parameters if counts(n, mesh)}
    if len(counted) == len(parameters):
        return
    step = optimizer.step

    def spoil_and_step(*args: Any, **kwargs: Any) -> Any:
        gradients = list(_gradients(optimizer))
        left_out = [grad for parameter, grad in gradients if id(parameter) not in counted]
        counting = [grad for parameter, grad in gradients if id(parameter) in counted]
        if left_out and counting:
            # Of each the largest element, since in fp16 sums overflow where no element does.
            largest = torch.stack(torch._foreach_norm(left_out, math.inf))
            counting[0].detach().view(-1)[:1].masked_fill_(~largest.isfinite().all(), math.nan)
        return step(*args, **kwargs)

    optimizer.step = spoil_and_step


def _gradients(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the reduced gradients, where each of DeepSpeed's optimizers keeps it."""
    if isinstance(optimizer, BF16_Optimizer):
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    else:
        owned = getattr(optimizer, "params_in_partition", None) or optimizer.fp16_groups  # ZeRO 1 and 2, or 3
        groups = ((parameters, optimizer.averaged_gradients[i]) for i, parameters in enumerate(owned))
    for parameters, gradients in groups:  # ZeRO 1 and 2 may have a gradient more, for their padding
        yield from zip(parameters, gradients or (), strict=False)
