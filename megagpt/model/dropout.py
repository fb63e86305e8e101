"""Dropout as a module: it knows its site in the model; the mask is the op's business (ops/dropout.py)."""

from __future__ import annotations

from torch import Tensor, nn

from megagpt.ops.dropout import dropout

EMBEDDING_SITE = 0
SITES_PER_BLOCK = 3  # attention probabilities, attention output, MLP output


def block_site(layer: int, which: int) -> int:
    """Number of a dropout site, unique in the model: part of the generator's key."""
    return 1 + layer * SITES_PER_BLOCK + which


class Dropout(nn.Module):
    """Zero with probability p while training. `offset`: first element, in its sample, of the shard that x holds."""

    def __init__(self, p: float, seed: int, site: int) -> None:
        super().__init__()
        self.p, self.seed, self.site = p, seed, site

    @property
    def active(self) -> bool:
        """Whether forward changes anything."""
        return self.training and self.p > 0.0

    def forward(self, x: Tensor, sample_ids_B: Tensor, offset: int = 0) -> Tensor:
        if not self.active:
            return x
        return dropout(x, sample_ids_B, p=self.p, seed=self.seed, site=self.site, offset=offset)

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site}"
