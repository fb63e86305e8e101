"""What adapters add to a layer: two thin matrices beside a map, W + scale B A, and what that saves. No torch.

A (rank, I) reads what W reads; B (*, O, rank), zero at first, gives what W gives: its rows are cut, packed and laid out
by head as those of W are. So a matrix that holds several (queries, keys and values; a gate and what it gates) has one A
for all of them, and a B whose rows are theirs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megagpt.config.lora import TARGETS
from megagpt.inventory.parameter import ZEROS, Init, Kept, Parameter, Parameters

if TYPE_CHECKING:
    from megagpt.config import ModelConfig
    from megagpt.config.lora import LoraConfig

PART, A, B = "lora", "a", "b"  # a module's adapter, and its parameters: blocks.0.mlp.up.lora.a


def adapted_modules(parameters: Parameters, lora: LoraConfig) -> list[str]:
    """The modules of a layer that have an adapter, in the order of the targets."""
    named = [module for target, modules in TARGETS.items() if target in lora.targets for module in modules]
    return [module for module in named if f"{module}.weight" in parameters]


def adapter(weight: Parameter, rank: int) -> dict[str, Parameter]:
    """A and B of one map. A is drawn with the variance that transformers' peft gives it: 1 / (3 inputs)."""
    *rows, n_inputs = weight.shape
    by_inputs = weight.sharded == len(rows)
    cut = None if by_inputs else weight.sharded
    init = Init("normal", (3 * n_inputs) ** -0.5)
    return {
        A: Parameter((rank, n_inputs), "map", init, sharded=1 if by_inputs else None),
        B: Parameter((*rows, rank), "map", ZEROS, sharded=cut, heads=weight.heads, maps_per_head=weight.maps_per_head),
    }


def adapters(parameters: Parameters, lora: LoraConfig) -> dict[str, Parameter]:
    """Those of a layer, by name within it."""
    assert lora.rank is not None
    return {
        f"{module}.{PART}.{leaf}": parameter
        for module in adapted_modules(parameters, lora)
        for leaf, parameter in adapter(parameters[f"{module}.weight"], lora.rank).items()
    }


def frozen(parameters: Parameters) -> dict[str, Parameter]:
    """The same, not trained."""
    return {name: replace(parameter, trained=False) for name, parameter in parameters.items()}


def kept_by_adapters(model: ModelConfig, parameters: Parameters, lora: LoraConfig) -> tuple[Kept, ...]:
    """What the backward pass of a block keeps for them, less (below 0) what only the gradient of a weight needed.

    A frozen map needs its input no more; an adapter does, or with dropout what is left of it.
    """
    rank, modules = lora.rank or 0, adapted_modules(parameters, lora)
    kept = [Kept("between A and B", rank, ways=1) for _ in modules]
    if lora.dropout > 0:
        of_each = (adapter(parameters[f"{module}.weight"], rank)[A] for module in modules)
        kept += [Kept("inputs after dropout", a.shape[1], ways=1 if a.sharded is None else None) for a in of_each]
    as_they_are = () if lora.dropout > 0 else lora.targets
    readers = [("qkv", "up")] if model.block == "parallel" else [("qkv",), ("up",)]  # of what each norm gives
    unread = sum(not any(target in as_they_are for target in targets) for targets in readers)
    kept += [Kept("inputs of frozen maps", -unread * model.d_model, ways=1)]
    kept += [] if "down" in as_they_are else [Kept("inputs of frozen maps", -model.ff_width)]
    return tuple(kept)
