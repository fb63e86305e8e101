"""Every setting of a run: frozen, keyword-only dataclasses, and the checks that need one section only.

Checks across sections (does tp divide n_heads?) live in `megagpt/plan`. The comment behind a field is its `--help`
text. No torch here: a wrong flag is reported in a moment.
"""

from megagpt.config.checks import divisors, require
from megagpt.config.model import ModelConfig
from megagpt.config.optim import OptimConfig
from megagpt.config.run import (
    SECTIONS,
    CheckpointConfig,
    DataConfig,
    DebugConfig,
    FaultConfig,
    LogConfig,
    ParallelConfig,
    RunConfig,
    plain,
)
from megagpt.config.train import TrainConfig

__all__ = [
    "SECTIONS",
    "CheckpointConfig",
    "DataConfig",
    "DebugConfig",
    "FaultConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "divisors",
    "plain",
    "require",
]
