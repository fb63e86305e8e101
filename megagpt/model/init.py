"""Initial weights: which standard deviation each matrix of the model is drawn with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megagpt.config import ModelConfig
from megagpt.parallel.parameter import NamedNormal


@dataclass(frozen=True)
class Init:
    """What ModelConfig.init names, for layers to draw their weights from by (seed, canonical name).

    Source: gpt2: Radford et al. 2019, section 2.3. normal: Radford et al. 2018, section 4.1. small: Nguyen & Salazar
    2019, section 2.2, and Wang & Komatsuzaki 2021 (GPT-NeoX: Black et al. 2022, section 2.2). fan_in: Chowdhery et al.
    2022, section 5.
    """

    config: ModelConfig
    seed: int = 0

    def embedding(self, name: str) -> NamedNormal:
        """For tables that are looked up in."""
        config = self.config
        std = {"small": _small(config), "fan_in": 1.0}.get(config.init, config.init_std)
        return NamedNormal(self.seed, name, std)

    def matrix(self, name: str) -> NamedNormal:
        """For matrices that read the residual stream."""
        config = self.config
        std = {"small": _small(config), "fan_in": None}.get(config.init, config.init_std)
        return NamedNormal(self.seed, name, std)

    def residual(self, name: str) -> NamedNormal:
        """For matrices whose product is added to the residual stream."""
        config = self.config
        stds = {
            "gpt2": config.init_std / math.sqrt(2 * config.n_layers),
            "normal": config.init_std,
            "small": 2 / (config.n_layers * math.sqrt(config.d_model)),
            "fan_in": None,
        }
        return NamedNormal(self.seed, name, stds[config.init])


def _small(config: ModelConfig) -> float:
    return math.sqrt(2 / (5 * config.d_model))
