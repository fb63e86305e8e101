"""Position information inside of attention. What it needs is computed from the configuration, never stored.

The tables are no buffers: a model in 16 bits would round them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.config.kernels import AUTO, Kernels
from megagpt.ops.rotary import ntk_base, rotary, rotary_tables
from megagpt.ops.softmax import alibi_slopes


class Sinusoids(nn.Module):
    """Fixed positions to be added to embeddings: sine and cosine of neighbouring elements, at growing wavelengths.

    Shapes: x_BTD → positions_TD, in x's dtype.  Source: Vaswani et al. 2017, section 3.5.
    """

    def __init__(self, seq_len: int, d_model: int) -> None:
        super().__init__()
        self.shape = (seq_len, d_model)
        self.tables: dict[tuple, Tensor] = {}

    def forward(self, x_BTD: Tensor) -> Tensor:
        key = (x_BTD.device, x_BTD.dtype)
        if key not in self.tables:
            cos_TR, sin_TR = rotary_tables(self.shape[0], self.shape[1] + self.shape[1] % 2, dtype=torch.float64)
            table_TD = torch.stack((sin_TR, cos_TR), dim=-1).flatten(1)[:, : self.shape[1]]
            self.tables[key] = table_TD.to(*key)
        return self.tables[key][: x_BTD.shape[1]]


class Rotary(nn.Module):
    """Turns queries and keys by angles that grow with the position.

    Shapes: x_BTGXK → the same, of whose X heads a group the first n_rotated are turned; by default all but the last,
    the value. Of their width the first rotary_width elements are.
    Source: Su et al. 2021, section 3.4.2; Wang & Komatsuzaki 2021 (a part of the width, GPT-J's pairs of neighbours).
    """

    def __init__(self, config: ModelConfig, kernels: Kernels = AUTO) -> None:
        super().__init__()
        linear = config.rotary_scaling == "linear"
        self.seq_len, self.width, self.interleaved = config.seq_len, config.rotary_width, config.rotary_interleaved
        self.scaling = config.rotary_factor if linear else 1.0
        self.base = config.rotary_base if linear else ntk_base(config.rotary_base, config.rotary_factor, self.width)
        self.kernels = kernels["rotary"]
        self.tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def forward(self, x_BTGXK: Tensor, n_rotated: int | None = None) -> Tensor:
        dtype = torch.float64 if x_BTGXK.dtype == torch.float64 else torch.float32
        key, T = (x_BTGXK.device, dtype), x_BTGXK.shape[1]
        if key not in self.tables:
            how = {"base": self.base, "scaling": self.scaling, "device": x_BTGXK.device, "dtype": dtype}
            self.tables[key] = rotary_tables(self.seq_len, self.width, **how)
        cos_TR, sin_TR = self.tables[key]
        return rotary(
            x_BTGXK,
            cos_TR[:T],
            sin_TR[:T],
            n_rotated_heads=n_rotated,
            interleaved=self.interleaved,
            kernels=self.kernels,
        )


class Alibi(nn.Module):
    """The slopes of this rank's heads: scores lose slope * distance.

    Shapes: () → slopes_H float32.  Source: Press et al. 2022, section 3.
    """

    def __init__(self, n_heads: int, first_head: int, n_heads_local: int) -> None:
        super().__init__()
        self.heads = (n_heads, first_head, n_heads_local)
        self.slopes: dict[torch.device, Tensor] = {}

    def forward(self, device: torch.device) -> Tensor:
        if device not in self.slopes:
            n_heads, first, n_local = self.heads
            self.slopes[device] = alibi_slopes(n_heads)[first : first + n_local].to(device)
        return self.slopes[device]
