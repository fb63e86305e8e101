"""Where the elements of each parameter lie in the tensors that the optimizer steps on, whichever ZeRO stage cut them.

Without ZeRO these "masters" are the parameters themselves. With it each is a rank's share of many parameters, laid end
to end in fp32: a rank holds a run of a parameter's elements, all of it, or nothing. Moments, averages and gradients are
laid out as their master is.

What is cut from what, by its name: a *logical tensor* is what a run of one process would hold. A `Part` is what tensor
parallelism gives one rank of it, to compute with (parallel/parameter.py); a `Named` is the parameter that holds a part,
under its canonical name. A `Segment` is what ZeRO gives one rank of a part, to step. A `Piece` is what one file of a
checkpoint holds of a logical tensor (checkpoint/pieces.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.optim.rules import statistic_shape
from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import all_reduce
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.parameter import Named, Part

Elements = Callable[[int, int], Tensor]
"""(start, length) -> so many elements of a flattened tensor-parallel part, wherever they come from."""

_AT_ONCE = 1 << 22  # elements, 16 MiB


@dataclass(frozen=True, eq=False)
class Segment:
    """This rank's elements of a parameter.

    named: the parameter. shape: of its tensor-parallel part, with padding. master: where the elements are, from
    `offset` on. start, length: which of the flattened part they are; length 0 where this rank has none.
    """

    named: Named
    shape: torch.Size
    master: Tensor
    offset: int
    start: int
    length: int

    @staticmethod
    def whole(named: Named) -> Segment:
        """All of a parameter that is its own master: where there is no ZeRO."""
        return Segment(named, named.parameter.shape, named.parameter, 0, 0, named.parameter.numel())

    @property
    def gradients(self) -> Tensor:
        """Those of the master, laid out as it is. It has some while a step is taken."""
        assert self.master.grad is not None
        return self.master.grad

    def of(self, values: Tensor) -> Tensor:
        """The elements in a tensor that is laid out as the master is, as a view of shape (length,)."""
        return values.view(-1).narrow(0, self.offset, self.length)

    def alone(self, values: Tensor) -> Tensor:
        """These elements in their places in a tensor of the whole part, zeros elsewhere; a copy."""
        whole = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        whole.view(-1).narrow(0, self.start, self.length).copy_(self.of(values))
        return whole

    def elements_of(self, unpadded: Tensor) -> Elements:
        """Those of a tensor of the whole part without padding."""
        local = unpadded
        if unpadded.shape != self.shape:  # there is padding
            local = unpadded.new_zeros(self.shape)
            self.named.part.unpadded(local).copy_(unpadded)
        return lambda start, length: local.reshape(-1).narrow(0, start, length)

    def cut(self, whole: Tensor) -> Tensor:
        """These elements of a tensor of the whole part."""
        return whole.reshape(-1).narrow(0, self.start, self.length)


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of this rank's parameters, in the order of the model.

    of: by the name of the parameter. masters: by the tensor that they lie in; the same lists on every rank that shares
    the parameters. shards: the axis that ZeRO spreads a parameter's elements over; of size 1 without it.
    """

    of: Mapping[str, Segment]
    masters: Mapping[Tensor, list[Segment]]
    shards: Axis
    mesh: Mesh
    device: torch.device

    @staticmethod
    def listed(segments: Iterable[Segment], shards: Axis, mesh: Mesh, device: torch.device) -> Segments:
        """Those of all parameters, in the order of the model."""
        found = {segment.named.name: segment for segment in segments}
        masters: dict[Tensor, list[Segment]] = {}
        for segment in found.values():
            masters.setdefault(segment.master, []).append(segment)
        return Segments(found, masters, shards, mesh, device)

    def whole(self, segment: Segment, values: Tensor) -> Tensor:
        """The whole tensor-parallel part, from all ranks that have some of it.

        values: laid out as the segment's master is. Comm: all-reduce over `shards`.
        """
        if self.shards.size == 1:
            return segment.of(values).view(segment.shape)
        # Zeros elsewhere: a sum of one number and zeros is that number, to the bit.
        return all_reduce(segment.alone(values).to(self.device), self.shards)

    def gather(self, segment: Segment, values: Tensor, owner: tuple[int, int]) -> Tensor:
        """The logical tensor on one rank, on the others what they add to it.

        values: laid out as the segment's master is. owner: that rank's place on the data and the model axis.
        Comm: all-reduce over the model axis if the tensor is cut there, reduction over `shards`.
        """
        part, local = segment.named.part, segment.alone(values).to(self.device)
        full = local.new_zeros(part.shape)
        part.take(full).copy_(part.unpadded(local))
        if part.dim is not None:
            full = all_reduce(full, self.mesh.model)
        if self.shards.size > 1:
            dist.reduce(full, group=self.shards.group, group_dst=owner[0])
        return full

    def scatter(self, segment: Segment, full: Tensor, owner: tuple[int, int]) -> Tensor:
        """This rank's elements, in shape (length,), of a logical tensor that the owner has; `full` is overwritten.

        Comm: broadcast from the owner over the data axis, and from there over the model axis.
        """
        if self.mesh.model.rank == owner[1]:
            _broadcast(full, self.mesh.data, owner[0])
        _broadcast(full, self.mesh.model, owner[1])
        local, part = full.new_zeros(segment.shape), segment.named.part
        part.unpadded(local).copy_(part.take(full))
        return segment.cut(local)

    def totals(self, segments: list[Segment], values: list[Tensor]) -> list[Tensor]:
        """Sums over the ranks that share a logical tensor, for several at once; bitwise equal on all of them.

        values: one tensor a segment, of what this rank has of it. What all ranks of the model axis hold alike counts
        once. Comm: all-reduce over `shards` and over the model axis.
        """
        once = self.mesh.model.rank == 0
        counted = [v if once or s.named.part.dim is not None else v * 0 for s, v in zip(segments, values, strict=True)]
        flat = torch.cat([v.reshape(-1) for v in counted]).to(self.device)
        for axis in (self.shards, self.mesh.model):
            flat = all_reduce(flat, axis)
        sizes = [v.numel() for v in values]
        return [t.view(v.shape).to(v.device) for t, v in zip(flat.split(sizes), values, strict=True)]


def copy_elements(elements: Elements, start: int, to_N: Tensor) -> None:
    """Take the elements from `start` on into to_N, a few at a time: so they need hardly any memory of their own."""
    for done in range(0, len(to_N), _AT_ONCE):
        some = to_N[done : done + _AT_ONCE]
        some.copy_(elements(start + done, len(some)))


def _broadcast(full: Tensor, axis: Axis, source: int) -> None:
    if axis.size > 1:
        dist.broadcast(full, group=axis.group, group_src=source)


def place_of(named: Named, key: str) -> Part:
    """Which part this rank has of what is kept under a key: of a moment as of the parameter; statistics are whole."""
    shape = statistic_shape(key, named.part.shape)
    return named.part if shape is None else Part(shape, dim=None, start=0, length=0)
