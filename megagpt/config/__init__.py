"""Every setting of a run: frozen, keyword-only dataclasses, and the checks that need one section only.

Checks across sections (does tp divide n_heads?) live in `megagpt/plan`. The comment behind a field is its `--help`
text. No torch here: a wrong flag is reported in a moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from megagpt.config.finetune import FinetuneConfig
from megagpt.config.lora import LoraConfig
from megagpt.config.model import ModelConfig
from megagpt.config.optim import OptimConfig
from megagpt.config.sections import (
    CheckpointConfig,
    DataConfig,
    DebugConfig,
    FaultConfig,
    LogConfig,
    ParallelConfig,
)
from megagpt.config.train import TrainConfig
from megagpt.config.values import DataPath

__all__ = [
    "SECTIONS",
    "CheckpointConfig",
    "DataConfig",
    "DebugConfig",
    "FaultConfig",
    "FinetuneConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "plain",
]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    log: LogConfig = field(default_factory=LogConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


SECTIONS = tuple(f.name for f in fields(RunConfig))


def plain(config: Any) -> Any:
    """A configuration, or a section, as nested dicts of texts, numbers and lists: as it stands in files.

    `megagpt.cli.read_config` makes a RunConfig of it again.
    """
    if isinstance(config, DataPath):
        return config.words
    if isinstance(config, tuple):
        return [plain(value) for value in config]
    if hasattr(config, "parse"):
        return str(config)
    if is_dataclass(config):
        return {f.name: plain(getattr(config, f.name)) for f in fields(config)}
    return config
