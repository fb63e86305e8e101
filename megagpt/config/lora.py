"""Low-rank adapters: what is trained in place of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megagpt.config.checks import fraction, paths, positive
from megagpt.errors import require

TARGETS = {
    "qkv": ("attention.qkv", "attention.q", "attention.kv"),
    "out": ("attention.out",),
    "up": ("mlp.up",),
    "down": ("mlp.down",),
}
"""What --lora.targets names, and the modules of a block that it means: those of them that the block has."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA), trained and saved in place of the weights: docs/lora.md."""

    rank: int | None = None
    """Rank of the adapters, such as 8; default none: the weights themselves are trained."""
    alpha: float = 16.0
    """The scale of what adapters add is alpha / rank."""
    rslora: bool = False
    """The scale is alpha / sqrt(rank), with which larger ranks learn as fast (rsLoRA)."""
    dropout: float = 0.0
    """Dropout on what adapters read."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """The matrices that have adapters: qkv (queries, keys and values), out (of attention), up and down (of the MLP)."""
    base: str | None = None
    """Whose weights are adapted: RUN, RUN@best, RUN@STEP, or a checkpoint. Default: --load, where that holds no
    adapters; for a run that goes on, what it began with."""

    def __post_init__(self) -> None:
        positive("lora", self, "rank", "alpha")
        fraction("lora", self, "dropout")
        paths(self, "base")
        object.__setattr__(self, "targets", tuple(dict.fromkeys(self.targets)))
        unknown = [target for target in self.targets if target not in TARGETS]
        got, known = f"lora.targets={' '.join(self.targets)}", f"use some of {' '.join(TARGETS)}"
        require(not unknown, got, f"has {', '.join(map(repr, unknown))}, which is no target", known, "lora.targets")
        require(bool(self.targets), "lora.targets", "is empty", known, "lora.targets")
        base = f"lora.base={self.base} without lora.rank"
        keys = ("lora.base", "lora.rank")
        require(self.base is None or self.rank is not None, base, "adapts nothing", "give --lora.rank 8", *keys)

    @property
    def scale(self) -> float:
        """Of what adapters add. Source: Hu et al. 2021, section 4.1; rsLoRA: Kalajdzievski 2023."""
        assert self.rank is not None
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
