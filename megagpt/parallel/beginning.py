"""The first values of a parameter: an element is a function of (seed, canonical name, its place in the logical tensor).

So a rank draws what it holds, and nothing else: its part, or ZeRO's share of that. No layout plays a part.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megagpt.inventory.parameter import Init
from megagpt.philox import fill_normal

if TYPE_CHECKING:
    from megagpt.parallel.parameter import Part


@dataclass(frozen=True)
class Beginning:
    """How the elements of one rank's part of a parameter begin.

    part: which of the logical tensor they are.  shape: of that part as it is held, with padding, which begins as zeros.
    """

    init: Init
    part: Part
    shape: tuple[int, ...]
    seed: int
    name: str

    def elements(self, start: int, length: int) -> Tensor:
        """So many of the flattened part, fp32 in host memory."""
        return self.fill(torch.empty(length, device="cpu"), start)

    def fill(self, out_N: Tensor, start: int = 0) -> Tensor:
        """The same into a tensor of theirs."""
        kind = self.init.kind
        assert kind in ("normal", "zeros") or self.part.dim is None, "gains and rotations are whole on every rank"
        if kind == "normal":
            self._fill_normal(out_N, start)
        elif kind == "rotations":
            out_N.copy_(_rotations(self._key, self.shape, self.init.scale).view(-1)[start : start + len(out_N)])
        else:
            out_N.fill_(float(kind == "ones"))
        return out_N

    def _fill_normal(self, out_N: Tensor, start: int) -> None:
        """A row of the part, in all its dims from the sharded one on, is a range of one of the logical tensor."""
        part, dim, std = self.part, self.part.dim, self.init.scale
        if dim is None:
            fill_normal(out_N, self._key, std, start, max(1, len(out_N)), 0)
            return
        inner = math.prod(part.shape[dim + 1 :])
        held, valid, stride = self.shape[dim] * inner, part.length * inner, part.shape[dim] * inner
        if held == valid and start % held == 0:
            fill_normal(out_N, self._key, std, start // held * stride + part.start * inner, held, stride)
            return
        out_N.zero_()
        stop = start + len(out_N)
        for row in range(start // held, -(-stop // held)):
            begin, end = max(start, row * held), min(stop, row * held + valid)
            if begin < end:
                first = row * stride + part.start * inner + begin - row * held
                fill_normal(out_N[begin - start : end - start], self._key, std, first, end - begin, 0)

    @property
    def _key(self) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{self.name}".encode()).digest()[:8], "little")


def _rotations(key: int, shape: tuple[int, ...], scale: float) -> Tensor:
    """2x2 matrices [[c, -s], [s, c]], times scale, of the direction of a pair of normals each."""
    pairs = torch.empty(shape[:-1], device="cpu")
    fill_normal(pairs.view(-1), key, 1.0, 0, pairs.numel(), 0)
    x, y = pairs.double().unbind(-1)
    length = (x * x + y * y).sqrt()
    cos, sin = x / length, y / length
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2) * scale
