"""The smaller sections of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megagpt.config.checks import not_negative, parsed, paths, positive
from megagpt.config.values import DataPath, Partition, Short, Split, StepSet
from megagpt.errors import require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is spread over processes; dp is world size / (tp * pp)."""

    tp: Short[int] = 1
    """Tensor parallel size: processes that share every layer."""
    pp: Short[int] = 1
    """Pipeline parallel size: stages of consecutive layers."""
    partition: Short[Partition] = Partition()
    """How layers become stages: flops | parameters | uniform | explicit block counts such as 3,4,4,3."""
    zero_stage: Short[Literal[0, 1, 2, 3]] = 1
    """DeepSpeed ZeRO: shard 1 optimizer states, 2 also gradients, 3 also parameters (2 and 3 need pp=1)."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory and step there (needs zero_stage >= 1 and pp=1)."""
    recompute: Short[bool] = False
    """Recompute each block in the backward pass instead of storing its activations."""

    def __post_init__(self) -> None:
        positive("parallel", self, "tp", "pp")
        parsed(self, "partition", Partition)
        require(
            not (self.pp > 1 and self.zero_stage > 1),
            f"parallel.zero_stage={self.zero_stage} with parallel.pp={self.pp}",
            "cannot be combined (a pipeline keeps gradients over micro-batches)",
            "use --zero-stage 1, or --pp 1",
            *("parallel.zero_stage", "parallel.pp"),
        )
        require(
            not self.offload_optimizer or (self.pp == 1 and self.zero_stage >= 1),
            f"parallel.offload_optimizer with pp={self.pp}, zero_stage={self.zero_stage}",
            "needs pp=1 and zero_stage of at least 1",
            "drop --parallel.offload-optimizer, or use --pp 1 --zero-stage 1",
            *("parallel.offload_optimizer", "parallel.pp", "parallel.zero_stage"),
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read."""

    data_path: Short[DataPath] = DataPath()
    """Prefix of a dataset, or a blend: 0.7 A 0.3 B, or A B by size. Default: the Python standard library's text."""
    split: Short[Split] = Split.parse("949,50,1")
    """Shares of documents for train, validation, test."""
    cache_dir: str | None = None
    """Where the default corpus and its tokenizer are kept; default $XDG_CACHE_HOME/megagpt."""
    verify: bool = False
    """Read all the data first: the hash of each .bin, every token (without it: index, hash of it, size of .bin)."""
    tokenizer: Short[Literal["gpt2", "sentencepiece", "hf", "bytes"] | None] = None
    """Kind of the tokenizer; default: the one recorded beside the data."""
    tokenizer_model: Short[str | None] = None
    """Model file of a sentencepiece or hf tokenizer."""
    vocab_file: Short[str | None] = None
    """vocab.json of the gpt2 tokenizer."""
    merge_file: Short[str | None] = None
    """merges.txt of the gpt2 tokenizer."""

    def __post_init__(self) -> None:
        parsed(self, "data_path", DataPath)
        parsed(self, "split", Split)
        paths(self, "cache_dir", "tokenizer_model", "vocab_file", "merge_file")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved and kept, and what a run goes on from."""

    save: Short[str | None] = None
    """Run folder: checkpoints, metrics.jsonl, TensorBoard, loss curve. Default: a new folder under runs/."""
    load: Short[str | None] = None
    """What to go on from: RUN, RUN@best, RUN@STEP, or the folder of a checkpoint."""
    auto_resume: Short[bool] = False
    """Go on with the run in --save if it has a checkpoint; start it if not."""
    load_fallback: Short[bool] = False
    """Where a checkpoint is damaged, take the newest one before it that is whole."""
    allow_missing: Short[bool] = False
    """Begin with first values for tensors that the checkpoint to go on from lacks."""
    allow_unused: Short[bool] = False
    """Leave tensors of that checkpoint that this run has no place for."""
    save_interval: Short[int | None] = None
    """Steps between checkpoints; default only at the end."""
    async_save: Short[bool] = False
    """Write checkpoints while training goes on, from a copy in host memory."""
    keep_last: Short[int | None] = None
    """Keep this many of the newest checkpoints; default all."""
    keep_every: int | None = None
    """Keep those at multiples of this step too."""
    keep_best: bool = False
    """Keep the one with the lowest validation loss too."""

    def __post_init__(self) -> None:
        paths(self, "save", "load")
        positive("checkpoint", self, "save_interval", "keep_last", "keep_every")
        require(
            not self.auto_resume or (self.save is not None and self.load is None),
            f"checkpoint.auto_resume with save={self.save}, load={self.load}",
            "needs to know the run folder, and looks there for what to load",
            "give --save RUN, and no --load",
            *("checkpoint.auto_resume", "checkpoint.save", "checkpoint.load"),
        )


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """What happens when something goes wrong, and when the time is up."""

    exit_after_minutes: Short[float | None] = None
    """Save and end (exit code 75) after this time; default no limit."""
    heartbeat_timeout_s: float = 60.0
    """A process that gives no sign of life for this long counts as dead or stopped."""
    progress_timeout_s: float = 600.0
    """Processes that live but get nowhere for this long hang; also the limit of one collective."""
    max_bad_steps: int = 10
    """Steps in a row with a NaN or Inf, each skipped, before the run gives up."""
    spike_zscore: float = 10.0
    """A loss or gradient norm this many robust standard deviations above the last ones is a spike; 0: never."""
    on_spike: Literal["log", "rewind"] = "log"
    """Write a spike down, or also go back to the last checkpoint and skip the samples that made it."""
    max_rewinds: int = 3
    """Rewinds before the run gives up."""
    skip_steps: StepSet = StepSet()
    """Steps whose batch is not trained on, such as 57,60-62; a rewind adds to them by itself."""
    slow_rank_factor: float = 1.5
    """Name a process that is busy this many times as long as its peers; 0: never."""

    def __post_init__(self) -> None:
        positive("faults", self, "exit_after_minutes", "heartbeat_timeout_s", "progress_timeout_s", "max_bad_steps")
        not_negative("faults", self, "spike_zscore", "slow_rank_factor", "max_rewinds")
        parsed(self, "skip_steps", StepSet)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown and measured, and how often."""

    log_interval: Short[int] = 1
    """Steps between log lines."""
    eval_interval: Short[int] = 100
    """Steps between validations; one more comes at the end."""
    eval_steps: Short[int] = 5
    """Global batches of one validation; 0 turns validation off."""
    noise_scale: bool = False
    """Measure the gradient noise scale, about the largest batch that pays (McCandlish et al. 2018)."""
    sample_prompts: tuple[str, ...] = ()
    """Texts that the model goes on from every so often: shown, and kept in samples.jsonl and TensorBoard."""
    sample_interval: int = 500
    """Steps between such samples; more come at the end."""
    sample_tokens: int = 60
    """Tokens of each."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (extra: pip install megagpt[wandb])."""

    def __post_init__(self) -> None:
        positive("log", self, "log_interval", "eval_interval", "sample_interval", "sample_tokens")
        not_negative("log", self, "eval_steps")


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Switches that help to find what is wrong."""

    overfit_one_batch: bool = False
    """Train on the first batch again and again: the loss must go to 0."""
    check_ranks: bool = False
    """After each step, check that what must be equal across ranks is equal."""
    detect_nan: bool = False
    """Stop at the first module that produces a NaN or Inf, and name it."""
