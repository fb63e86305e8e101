"""Which module of which rank was the first to hold a NaN or Inf: found by doing a skipped step again, under watch.

The weights have not moved, and nothing in a step is random: what happened happens again. So steps that go well pay
nothing. Where it does not happen again, a machine has computed wrongly, and the step that was right counts.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.data.loader import MicroBatch

if TYPE_CHECKING:
    from megagpt.train.step.engine import Engine, StepResult


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """The first value that was not finite, as one rank saw it.

    module: its canonical name (of a parameter where `what` says so). what: output, input, gradient of the output, or
    gradient of the parameter. micro_batch: of the rank's own in the step, from 0. samples: positions in the run.
    """

    module: str
    what: str
    n_nan: int
    n_inf: int
    n_values: int
    micro_batch: int
    samples: list[int]
    layer: int
    order: int
    rank: int
    place: str
    host: str

    @property
    def came_at(self) -> tuple[int, bool, int, int, int]:
        """What sorts the sightings of all ranks by cause: micro-batches have nothing to do with each other."""
        backward = "gradient" in self.what
        return self.micro_batch, backward, -self.layer if backward else self.layer, self.order, self.rank


def retry_under_watch(engine: Engine, step: int, batches: Iterable[MicroBatch]) -> tuple[StepResult, Sighting | None]:
    """Do the skipped step `step` again: its result now, and where it went wrong first, the same on all ranks.

    None where no module did: only in what was added up over micro-batches and ranks.
    Comm: as a step, and one all-gather of short objects.
    """
    with _Watch(engine, step) as watch:
        result = engine.retry_step(step, batches)
    found: list[Sighting | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, watch.first)
    first = min((s for s in found if s is not None), key=lambda s: s.came_at, default=None)
    return result, first if result.skipped else None


def weight_not_finite(engine: Engine) -> Sighting | None:
    """The first weight that holds a NaN or Inf on some rank, as all ranks are told; None where all are finite.

    Comm: one all-gather of short objects.
    """
    mine = None
    for layer, named in enumerate(engine.parameters):
        for values in engine.backend.local_weights(named):
            if mine is None and not bool(torch.isfinite(values).all()):
                mine = _sighting(engine, named.name, "weight", values, 0, [], layer, 0)
    found: list[Sighting | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return next((s for s in found if s is not None), None)


class _Watch:
    """Hooks on every module and parameter of this rank, for as long as the block lasts.

    Every layer is given the positions of its samples; by them a value is told to be of which micro-batch and sample.
    """

    def __init__(self, engine: Engine, step: int) -> None:
        self._engine, self._first_sample = engine, engine.schedule.positions(step).start
        self._handles: list[Any] = []
        self._now: Tensor | None = None  # the samples of the layer that is being computed; None: recomputation
        self._seen: list[Tensor] = []  # the samples of each micro-batch so far
        self._looks = 0
        self.first: Sighting | None = None

    def __enter__(self) -> _Watch:
        layers = self._engine.backend.layers
        self._handles.append(layers[0][1].register_forward_pre_hook(self._next_micro_batch))
        for name, layer in layers:
            self._handles.append(layer.register_forward_pre_hook(self._begin))
            for module_name, module in layer.named_modules(prefix=name):
                self._watch_module(module_name, module, _depth(name))
            self._handles.append(layer.register_forward_hook(self._end))
        for named in self._engine.masters.parameters:
            self._watch_parameter(named.name, named.parameter, _depth(named.name))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _next_micro_batch(self, _layer: nn.Module, inputs: tuple[tuple[Tensor, Tensor]]) -> None:
        self._seen.append(inputs[0][1].cpu())

    def _begin(self, _layer: nn.Module, _inputs: object) -> None:
        self._now = self._seen[-1]

    def _end(self, *_: object) -> None:
        self._now = None

    def _watch_module(self, name: str, module: nn.Module, layer: int) -> None:
        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for value in _floats(inputs):
                self._look(value, name, "input", layer, self._now)

        def after(_module: nn.Module, _inputs: object, output: Any) -> None:
            samples = self._now
            for value in _floats(output):
                self._look(value, name, "output", layer, samples)
                if value.requires_grad and samples is not None:
                    value.register_hook(lambda grad: self._look(grad, name, "gradient of the output", layer, samples))

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _watch_parameter(self, name: str, parameter: nn.Parameter, layer: int) -> None:
        calls: list[None] = []  # one a micro-batch, in their order

        def look(grad: Tensor) -> None:
            samples = self._seen[len(calls)]
            calls.append(None)
            self._look(grad, name, "gradient of the parameter", layer, samples)

        self._handles.append(parameter.register_hook(look))

    def _look(self, value: Tensor, name: str, what: str, layer: int, samples_B: Tensor | None) -> None:
        self._looks += 1  # the ranks of a model axis look at the same, in the same order
        finite = torch.isfinite(value.detach())
        if samples_B is None or bool(finite.all()):
            return
        rows = ~finite.flatten(1).all(1).cpu() if finite.dim() > 1 and len(finite) == len(samples_B) else slice(None)
        samples = samples_B if "parameter" in what else samples_B[rows]
        chunk = self._engine.config.train.micro_batch_size * self._engine.mesh.data.size
        micro_batch = (int(samples_B[0]) - self._first_sample) // chunk
        seen = _sighting(self._engine, name, what, value, micro_batch, samples.tolist(), layer, self._looks)
        if self.first is None or seen.came_at < self.first.came_at:
            self.first = seen


def _sighting(
    engine: Engine, name: str, what: str, value: Tensor, micro_batch: int, samples: list[int], layer: int, order: int
) -> Sighting:
    return Sighting(
        module=name,
        what=what,
        n_nan=int(value.isnan().sum()),
        n_inf=int(value.isinf().sum()),
        n_values=value.numel(),
        micro_batch=micro_batch,
        samples=samples,
        layer=layer,
        order=order,
        rank=engine.mesh.rank,
        place=engine.mesh.name,
        host=socket.gethostname(),
    )


def _depth(name: str) -> int:
    """The place of a layer, or of what belongs to it, in the whole model."""
    if name.startswith("embedding"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 1 << 30


def _floats(values: Any) -> list[Tensor]:
    if isinstance(values, tuple):
        return [tensor for value in values for tensor in _floats(value)]
    return [values] if isinstance(values, Tensor) and values.is_floating_point() else []
