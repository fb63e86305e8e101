"""The fp32 weights that a run trains and what its optimizer keeps of them, by key, whichever ZeRO stage holds it.

"weight" is the fp32 weight; the optimizer's moments and statistics and the average have their own keys
(optim/rules.py). Values are this rank's part of the logical tensor (`place_of`), without padding, and whole over the
data axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagpt.config import OptimConfig
from megagpt.inventory.parameter import AVERAGE, WEIGHT
from megagpt.optim.mesh_optimizer import MeshOptimizer
from megagpt.optim.rules import rule_of, statistic_shape
from megagpt.optim.segments import Elements, Segment, copy_elements
from megagpt.parallel.parameter import Named, trained
from megagpt.train.step.backend import Backend


class Masters:
    """Reads and writes them where the backend's optimizer steps them."""

    def __init__(self, backend: Backend, config: OptimConfig) -> None:
        """Makes all that is kept exist before the first step: moments as zeros, the average as the weights.

        So memory is taken at the start, and a checkpoint has a place to be loaded into.
        """
        self.parameters, self.segments = trained(backend.parameters), backend.segments
        self.mesh, self.device = backend.segments.mesh, backend.segments.device
        self._backend, self._optimizer, self._config = backend, backend.optimizer, config
        self._statistics: dict[str, dict[str, Tensor]] = {}
        if isinstance(self._optimizer, MeshOptimizer):
            self._optimizer.bind(self.segments)
            self._statistics = self._optimizer.statistics
        for master, segments in self.segments.masters.items():
            self._create_state(master, segments)

    @property
    def kept(self) -> dict[str, list[Named]]:
        """The parameters that there is something of under each key, in the order of the model; weights first."""
        found = {WEIGHT: self.parameters}
        for named in self.parameters:
            rule = rule_of(named.declared, self._config)
            for key in (*rule.moments, *rule.statistics):
                found.setdefault(key, []).append(named)
        return found

    def read(self, named: Named, key: str) -> Tensor:
        """What there is of one parameter under a key.

        Comm: with ZeRO, an all-reduce over the data axis: every rank of it must call this.
        """
        if key in self._statistics:
            return self._statistics[key][named.name]
        segment = self.segments.of[named.name]
        whole = self.segments.whole(segment, self._values(segment, key).detach())
        return named.part.unpadded(whole).contiguous()

    def write(self, named: Named, key: str, value: Tensor) -> None:
        """Set what `read` gives (of a weight also what the model computes with). Comm: none."""
        if key in self._statistics:
            self._statistics[key][named.name].copy_(value)
            return
        segment = self.segments.of[named.name]
        self._set(segment, key, segment.elements_of(value))

    def begin(self, seed: int) -> None:
        """Set the first weights of a run, and the average with them: each rank draws what it holds. Comm: none."""
        for named in self.parameters:
            segment = self.segments.of[named.name]
            elements = named.beginning(segment.shape, seed).elements
            self._set(segment, WEIGHT, elements)
            if AVERAGE in self._optimizer.state[segment.master]:
                self._set(segment, AVERAGE, elements)

    def _set(self, segment: Segment, key: str, elements: Elements) -> None:
        values = segment.of(self._values(segment, key).detach())
        copy_elements(elements, segment.start, values)
        if key == WEIGHT and segment.master is not segment.named.parameter:
            self._backend.set_weight(segment, elements)

    def set_step(self, step: int) -> None:
        """Set the optimizer's own count of its steps, which the bias correction of Adam's moments needs."""
        for group in self._optimizer.param_groups:
            if "step" in group:
                group["step"] = step
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(step)

    def _create_state(self, master: Tensor, segments: list[Segment]) -> None:
        rule = rule_of(segments[0].named.declared, self._config)
        state: dict[str, Any] = {key: torch.zeros_like(master, dtype=torch.float32) for key in rule.moments}
        if AVERAGE in state:
            state[AVERAGE].copy_(master.detach())
        if "step" not in self._optimizer.param_groups[0]:  # apex counts in the group, torch by tensor
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        self._optimizer.state[master] = state
        for key in rule.statistics:
            tensors = self._statistics.setdefault(key, {})
            for segment in segments:
                shape = statistic_shape(key, segment.named.part.shape)
                assert shape is not None, key
                tensors[segment.named.name] = torch.zeros(shape, device=master.device)

    def _values(self, segment: Segment, key: str) -> Tensor:
        return segment.master if key == WEIGHT else self._optimizer.state[segment.master][key]
