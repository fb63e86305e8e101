"""Dropout as a module: it knows its site in the model; the mask is the op's business (ops/dropout.py)."""

from __future__ import annotations

from torch import Tensor, nn

from megagpt.config.kernels import AUTO, Kernels
from megagpt.ops.bias_dropout_add import bias_dropout_add
from megagpt.ops.dropout import dropout
from megagpt.parallel.linear import Epilogue

EMBEDDING_SITE = 0
SITES_PER_BLOCK = 3  # attention probabilities, attention output, MLP output
FIRST_ADAPTER_SITE = 1 << 24


def block_site(layer: int, which: int) -> int:
    """Number of a dropout site, unique in the model: part of the generator's key."""
    return 1 + layer * SITES_PER_BLOCK + which


def adapter_site(layer: int, which: int, n_modules: int) -> int:
    """That of an adapter: of `n_modules` that a block may have, number `which`. Beyond all sites of blocks."""
    return FIRST_ADAPTER_SITE + layer * n_modules + which


class Dropout(nn.Module):
    """Zero with probability p while training. `offset`, `within`: which part of its samples x holds (`dropout`)."""

    def __init__(self, p: float, seed: int, site: int, kernels: Kernels = AUTO) -> None:
        super().__init__()
        self.p, self.seed, self.site, self.kernels = p, seed, site, kernels

    @property
    def active(self) -> bool:
        """Whether forward changes anything."""
        return self.training and self.p > 0.0

    def forward(
        self, x: Tensor, sample_ids_B: Tensor, offset: int = 0, within: tuple[int, int] | None = None
    ) -> Tensor:
        if not self.active:
            return x
        return dropout(
            x,
            sample_ids_B,
            p=self.p,
            seed=self.seed,
            site=self.site,
            offset=offset,
            within=within,
            kernels=self.kernels["dropout"],
        )

    def join(self, residual_BTD: Tensor, sample_ids_B: Tensor) -> Epilogue:
        """What ends a sub-block: residual + dropout(x + bias), as the epilogue of its last linear layer."""

        def epilogue(x_BTD: Tensor, bias_D: Tensor | None) -> Tensor:
            return bias_dropout_add(
                x_BTD,
                bias_D,
                residual_BTD,
                sample_ids_B,
                p=self.p if self.active else 0.0,
                seed=self.seed,
                site=self.site,
                kernels=self.kernels["bias_dropout_add"],
            )

        return epilogue

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site}"
