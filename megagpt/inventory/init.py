"""Initial weights: which standard deviation ModelConfig.init gives each matrix.

Source: gpt2: Radford et al. 2019, section 2.3. normal: Radford et al. 2018, section 4.1. small: Nguyen & Salazar 2019,
section 2.2, and Wang & Komatsuzaki 2021 (GPT-NeoX: Black et al. 2022, section 2.2). fan_in: Chowdhery et al. 2022,
section 5.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megagpt.inventory.parameter import Init

if TYPE_CHECKING:
    from megagpt.config import ModelConfig


def embedding_init(model: ModelConfig) -> Init:
    """Of tables that are looked up in: tokens, learned positions."""
    stds = {"small": _small(model), "fan_in": 1.0}
    return Init("normal", stds.get(model.init, model.init_std))


def matrix_std(model: ModelConfig, n_inputs: int) -> float:
    """Of matrices that read the residual stream."""
    stds = {"small": _small(model), "fan_in": n_inputs**-0.5}
    return stds.get(model.init, model.init_std)


def matrix_init(model: ModelConfig, n_inputs: int) -> Init:
    """The same, as an `Init`."""
    return Init("normal", matrix_std(model, n_inputs))


def residual_std(model: ModelConfig, n_inputs: int) -> float:
    """Of matrices whose product is added to the residual stream."""
    stds = {
        "gpt2": model.init_std / math.sqrt(2 * model.n_layers),
        "normal": model.init_std,
        "small": 2 / (model.n_layers * math.sqrt(model.d_model)),
        "fan_in": n_inputs**-0.5,
    }
    return stds[model.init]


def _small(model: ModelConfig) -> float:
    return math.sqrt(2 / (5 * model.d_model))
