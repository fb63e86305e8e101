"""What decoding keeps of the tokens before: keys and values, by layer and row.

Shapes: B rows of a pass, T its tokens, S places that are looked at, G this rank's heads of keys and values, K head
width, X keys and values side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megagpt.inventory.attention import cached_places

if TYPE_CHECKING:
    from megagpt.config import ModelConfig

NEVER = 1 << 40  # the position of a place that nothing was written to: later than any query


class Cache:
    """Keys and values of n_rows texts: the token at position p of a row lies in place p, in a window of W in p mod W.

    Memory: `inventory.attention.cached_numbers` of each layer and row.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Iterable[int],
        tp: int,
        *,
        n_rows: int,
        n_places: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        n_heads, width = max(1, config.kv_heads // tp), config.head_width
        self.layers = {
            layer: torch.zeros(
                n_rows, n_heads, 2, cached_places(config, layer, n_places), width, dtype=dtype, device=device
            )
            for layer in layers
        }
        self.n_places, self.device = n_places, device

    def move(self, row: int, to: int, n: int) -> None:
        """Copy the first n places of a row over those of another one."""
        for kv_RGXSK in self.layers.values():
            kv_RGXSK[to, :, :, :n] = kv_RGXSK[row, :, :, :n]

    def view(self, first_row: int, starts: Sequence[int], counts: Sequence[int], n_tokens: int) -> View:
        """For a pass of neighbouring rows: where each begins, and how many of its n_tokens are tokens."""
        rows = slice(first_row, first_row + len(starts))
        end = max(start + count for start, count in zip(starts, counts, strict=True))
        sees_all = n_tokens == 1 and min(starts) == max(starts) and min(counts) == 1
        starts_B, counts_B = torch.tensor(starts), torch.tensor(counts)
        times_T = torch.arange(n_tokens)
        positions_BT = (starts_B[:, None] + times_T.minimum((counts_B - 1).clamp(min=0)[:, None])).to(self.device)
        if min(counts) == n_tokens:
            return View(self, rows, positions_BT, None, end, sees_all)
        packed_N = (times_T < counts_B[:, None]).flatten().nonzero()[:, 0].to(self.device)
        return View(self, rows, positions_BT, counts_B, end, sees_all, packed_N)

    def whole_view(self, positions_B1: Tensor) -> View:
        """For a token of each of the first rows, which looks at every place: the same work wherever they stand."""
        return View(self, slice(0, len(positions_B1)), positions_B1, None, self.n_places, sees_all=False)


@dataclass
class View:
    """The rows of a cache that a pass reads and adds to.

    counts_B: tokens of each row, where these are not all; the others are padding, seen by nobody. Only attention has
    padding: elsewhere the tokens lie packed, one row's after another's.  packed_N: which of all B x T these are.
    end: the furthest position of any row, and one.
    sees_all: whether each row has one token, and all at the same position: then they see all keys, of a window too.
    kept: masks that layers share in this pass.  written: where layers with so many places write.
    """

    cache: Cache
    rows: slice
    positions_BT: Tensor  # noqa: N815
    counts_B: Tensor | None  # noqa: N815
    end: int
    sees_all: bool
    packed_N: Tensor | None = None  # noqa: N815
    kept: dict[object, Tensor] = field(default_factory=dict)
    written: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def packed(self, x_BTX: Tensor) -> Tensor:
        """The tokens without padding, where there is any.  Shapes: (B, T, …) → (1, N, …)."""
        return x_BTX if self.packed_N is None else x_BTX.flatten(0, 1)[self.packed_N][None]

    def by_row(self, x_1NX: Tensor) -> Tensor:
        """With padding again.  Shapes: (1, N, …) → (B, T, …)."""
        if self.packed_N is None:
            return x_1NX
        x_RX = x_1NX.new_zeros(self.positions_BT.numel(), *x_1NX.shape[2:])
        return x_RX.index_copy_(0, self.packed_N, x_1NX[0]).unflatten(0, self.positions_BT.shape)

    def extend(self, layer: int, kv_BTGXK: Tensor) -> tuple[Tensor, Tensor]:
        """Add these; returns all keys and values: (B, G, S, K) twice."""
        kv_BGXSK, T = self.cache.layers[layer][self.rows], kv_BTGXK.shape[1]
        n_places = kv_BGXSK.shape[3]
        if T > 1 and self.end > n_places:  # what the first of these tokens see is overwritten by the last ones
            found = torch.cat((kv_BGXSK, kv_BTGXK.permute(0, 2, 3, 1, 4)), dim=3)
        else:
            found = kv_BGXSK[:, :, :, : self.end]
        if self.sees_all:
            kv_BGXSK[:, :, :, (self.end - 1) % n_places] = kv_BTGXK[:, 0]
        else:
            self._write(kv_BGXSK, kv_BTGXK)
        return found[:, :, 0], found[:, :, 1]

    def key_positions(self, layer: int) -> Tensor:
        """Those of the keys that `extend` returns.  Shapes: → (B or 1, S)."""
        n_places = self.cache.layers[layer].shape[3]
        if self.end <= n_places:  # nothing is overwritten
            return self._first(self.end)
        if self.positions_BT.shape[1] == 1:
            return self._around(self.positions_BT, n_places)
        before_BS = self._around(self.positions_BT[:, :1] - 1, n_places)
        return torch.cat((before_BS, self._real()), dim=1)

    def _first(self, n: int) -> Tensor:
        """0 … n - 1: places that are positions. Those that a row has not reached are later than its queries."""
        return torch.arange(n, device=self.positions_BT.device)[None]

    def _around(self, last_B1: Tensor, n_places: int) -> Tensor:
        """The positions in the places of a window, of which the last one was written last.  Shapes: → (B, W)."""
        positions_BS = last_B1 - (last_B1 - self._first(n_places)) % n_places
        return torch.where(positions_BS < 0, NEVER, positions_BS)

    def _real(self) -> Tensor:
        """The positions of this pass, where they are of tokens.  Shapes: → (B, T)."""
        if self.counts_B is None:
            return self.positions_BT
        is_padding_BT = torch.arange(self.positions_BT.shape[1]) >= self.counts_B[:, None]
        return self.positions_BT.masked_fill(is_padding_BT.to(self.positions_BT.device), NEVER)

    def _write(self, kv_BGXSK: Tensor, kv_BTGXK: Tensor) -> None:
        """The tokens of each row, the last ones where a window does not hold them all."""
        n_places = kv_BGXSK.shape[3]
        if n_places not in self.written:
            self.written[n_places] = self._places(n_places, kv_BTGXK.shape[1])
        rows, times, places = self.written[n_places]
        kv_BGXSK[rows, :, :, places] = kv_BTGXK[rows, times]

    def _places(self, n_places: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, time in the pass, and place of each token that is kept."""
        if T == 1 and self.counts_B is None:  # without a look at the host, as a CUDA graph wants it
            rows = torch.arange(len(self.positions_BT), device=self.cache.device)
            return rows, torch.zeros_like(rows), self.positions_BT[:, 0] % n_places
        counts_B1 = torch.full((len(self.positions_BT), 1), T) if self.counts_B is None else self.counts_B[:, None]
        times_T = torch.arange(T)
        rows, times = ((times_T < counts_B1) & (times_T >= counts_B1 - n_places)).nonzero(as_tuple=True)
        rows, times = rows.to(self.cache.device), times.to(self.cache.device)
        return rows, times, self.positions_BT[rows, times] % n_places
