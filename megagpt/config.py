"""Every setting of a run: frozen, keyword-only dataclasses, and the checks that need one section only.

`RunConfig` nests the sections. Checks across sections (does tp divide n_heads?) live in `megagpt/plan`.
The comment behind a field is its `--help` text. No torch here: a wrong flag is reported in a moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from tyro.conf import arg

from megagpt.errors import UserError
from megagpt.kernels import Kernels

_MAX_INT = 2**63 - 1
_MAX_LAYERS = 4096  # the plan lists them one by one
_TOO_LARGE = ("must be at most 2^63 - 1", "use a number that a run can reach")


def require(ok: bool, got: str, wanted: str, remedy: str) -> None:
    """Raise `UserError` "got: wanted; remedy" unless ok."""
    if not ok:
        raise UserError(f"{got} {wanted}; {remedy}")


def _is_finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # an integer may be too large to be made a float


def _positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = value is None or (_is_finite(value) and value > 0)
        remedy = "use 1 or more" if isinstance(value, int) else "use a finite number above 0"
        require(ok, f"{section}.{name}={value}", "must be positive", remedy)
        require(not isinstance(value, int) or value <= _MAX_INT, f"{section}.{name}={value}", *_TOO_LARGE)


def _not_negative(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = _is_finite(value) and value >= 0
        require(ok, f"{section}.{name}={value}", "must be finite and not negative", "0 turns it off")
        require(value <= _MAX_INT, f"{section}.{name}={value}", *_TOO_LARGE)


def _fraction(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = 0.0 <= value < 1.0  # false for NaN too
        require(ok, f"{section}.{name}={value}", "must be at least 0 and below 1", "use for example 0.1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture."""

    n_layers: Annotated[int, arg(aliases=["--n-layers"])] = 4
    """Transformer blocks."""
    d_model: Annotated[int, arg(aliases=["--d-model"])] = 192
    """Width of the residual stream."""
    n_heads: Annotated[int, arg(aliases=["--n-heads"])] = 4
    """Attention heads."""
    d_head: int | None = None
    """Width of one head; default d_model / n_heads."""
    d_ff: int | None = None
    """Width of the MLP; default 4 * d_model."""
    seq_len: Annotated[int, arg(aliases=["--seq-len"])] = 256
    """Context length in tokens, and the length of a training sample."""
    vocab_size: Annotated[int | None, arg(aliases=["--vocab-size"])] = None
    """Tokens of the vocabulary; default the tokenizer's. Padding for tp is added by itself."""
    position: Literal["learned", "rotary", "alibi", "none"] = "learned"
    """Position information: learned absolute embeddings (GPT-2), rotary (RoFormer), ALiBi, or none."""
    rotary_base: float = 10000.0
    """Base of the rotary wavelengths."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each sub-block and before the head."""
    activation: Literal["gelu_tanh", "gelu", "relu", "relu2", "swiglu", "geglu"] = "gelu_tanh"
    """MLP activation: GPT-2's tanh form, the exact GELU, ReLU, its square, or a gated unit (SiLU or GELU gate)."""
    tied_embeddings: bool = True
    """Use the token embedding as output matrix too."""
    dropout_embedding: float = 0.0
    """Dropout on the embeddings."""
    dropout_attention: float = 0.0
    """Dropout on the attention probabilities."""
    dropout_residual: float = 0.0
    """Dropout on what each sub-block adds to the residual stream."""
    norm_eps: float = 1e-5
    """Epsilon of the LayerNorms."""
    init_std: float = 0.02
    """Standard deviation of initial weights; residual projections: init_std / sqrt(2 * n_layers) (GPT-2)."""

    def __post_init__(self) -> None:
        _positive(
            "model",
            self,
            "n_layers",
            "d_model",
            "n_heads",
            "d_head",
            "d_ff",
            "seq_len",
            "vocab_size",
            "norm_eps",
            "init_std",
            "rotary_base",
        )
        require(
            self.n_layers <= _MAX_LAYERS,
            f"model.n_layers={self.n_layers}",
            f"must be at most {_MAX_LAYERS}",
            "published models have up to 200",
        )
        _fraction("model", self, "dropout_embedding", "dropout_attention", "dropout_residual")
        require(
            self.d_head is not None or self.d_model % self.n_heads == 0,
            f"model.d_model={self.d_model} with model.n_heads={self.n_heads}",
            "must divide evenly",
            f"try n_heads in {divisors(self.d_model)[:12]}, or set d_head",
        )
        require(
            self.position != "rotary" or self.head_width % 2 == 0,
            f"model.position=rotary with heads of width {self.head_width}",
            "must turn pairs of numbers: an even width",
            "set d_head to an even number",
        )

    @property
    def gated(self) -> bool:
        """Whether the MLP's hidden width comes twice, as gate and as value."""
        return self.activation.endswith("glu")

    @property
    def head_width(self) -> int:
        """d_head, resolved."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        """d_ff, resolved."""
        return self.d_ff or 4 * self.d_model

    @property
    def vocab(self) -> int:
        """vocab_size, once the tokenizer has set it."""
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not known yet; set it, or give a tokenizer")
        return self.vocab_size


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is spread over processes. dp is what remains: world size / (tp * pp)."""

    tp: Annotated[int, arg(aliases=["--tp"])] = 1
    """Tensor parallel size: processes that share every layer."""
    pp: Annotated[int, arg(aliases=["--pp"])] = 1
    """Pipeline parallel size: stages of consecutive layers."""
    partition: Annotated[str, arg(aliases=["--partition"])] = "flops"
    """How layers become stages: flops | parameters | uniform | explicit block counts such as 3,4,4,3."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], arg(aliases=["--zero-stage"])] = 1
    """DeepSpeed ZeRO: shard 1 optimizer states, 2 also gradients, 3 also parameters (2 and 3 need pp=1)."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory and step there (needs zero_stage >= 1 and pp=1)."""
    recompute: Annotated[bool, arg(aliases=["--recompute"])] = False
    """Recompute each block in the backward pass instead of storing its activations."""

    def __post_init__(self) -> None:
        _positive("parallel", self, "tp", "pp")
        require(
            not (self.pp > 1 and self.zero_stage > 1),
            f"parallel.zero_stage={self.zero_stage} with parallel.pp={self.pp}",
            "cannot be combined (a pipeline keeps gradients over micro-batches)",
            "use --zero-stage 1, or --pp 1",
        )
        require(
            not self.offload_optimizer or (self.pp == 1 and self.zero_stage >= 1),
            f"parallel.offload_optimizer with pp={self.pp}, zero_stage={self.zero_stage}",
            "needs pp=1 and zero_stage of at least 1",
            "drop --parallel.offload-optimizer, or use --pp 1 --zero-stage 1",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read."""

    data_path: Annotated[tuple[str, ...], arg(aliases=["--data-path"])] = ()
    """Prefix of an indexed dataset, or a blend: 0.7 A 0.3 B. Default: the Python standard library's text."""
    split: Annotated[str, arg(aliases=["--split"])] = "949,50,1"
    """Shares of documents for train, validation, test."""
    cache_dir: str | None = None
    """Where the default corpus and its tokenizer are kept; default $XDG_CACHE_HOME/megagpt."""
    verify: bool = False
    """Read all the data first: the hash of each .bin, every token (without it: index, hash of it, size of .bin)."""
    tokenizer: Annotated[Literal["gpt2", "sentencepiece", "hf", "bytes"] | None, arg(aliases=["--tokenizer"])] = None
    """Kind of the tokenizer; default: the one recorded beside the data."""
    tokenizer_model: Annotated[str | None, arg(aliases=["--tokenizer-model"])] = None
    """Model file of a sentencepiece or hf tokenizer."""
    vocab_file: Annotated[str | None, arg(aliases=["--vocab-file"])] = None
    """vocab.json of the gpt2 tokenizer."""
    merge_file: Annotated[str | None, arg(aliases=["--merge-file"])] = None
    """merges.txt of the gpt2 tokenizer."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule, and clipping."""

    lr: Annotated[float, arg(aliases=["--lr"])] = 2e-3
    """Peak learning rate."""
    min_lr_fraction: float = 0.1
    """The cosine ends at this share of the peak."""
    warmup_steps: Annotated[int, arg(aliases=["--warmup-steps"])] = 20
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """Step at which the cosine ends; default train.train_steps."""
    beta1: float = 0.9
    """Adam's first decay rate."""
    beta2: float = 0.95
    """Adam's second decay rate."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, arg(aliases=["--weight-decay"])] = 0.1
    """Decoupled weight decay; none on biases and norms."""
    clip: Annotated[float, arg(aliases=["--clip"])] = 1.0
    """Clip gradients to this global norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _positive("optim", self, "lr", "eps", "decay_steps")
        _fraction("optim", self, "beta1", "beta2")
        _not_negative("optim", self, "weight_decay", "clip", "warmup_steps", "min_lr_fraction")
        require(
            self.min_lr_fraction <= 1,
            f"optim.min_lr_fraction={self.min_lr_fraction}",
            "must be at most 1",
            "0.1 is usual",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, batches, precision, seeds, and the engine's own file."""

    train_steps: Annotated[int, arg(aliases=["--train-steps"])] = 500
    """Optimizer steps of the whole run."""
    micro_batch_size: Annotated[int, arg(aliases=["--micro-batch-size"])] = 2
    """Sequences that one process handles at a time."""
    global_batch_size: Annotated[int, arg(aliases=["--global-batch-size"])] = 8
    """Sequences in one optimizer step, over all processes."""
    precision: Annotated[Literal["fp32", "bf16", "fp16"], arg(aliases=["--precision"])] = "fp32"
    """Number format of weights and activations; optimizer states stay fp32."""
    kernels: Annotated[str, arg(aliases=["--kernels"])] = "auto"
    """auto | cuda | cpu | reference (plain PyTorch), with exceptions by op: auto,softmax=reference."""
    seed: Annotated[int, arg(aliases=["--seed"])] = 1234
    """Seed of weights, dropout and data order."""
    deepspeed_config: Annotated[str | None, arg(aliases=["--deepspeed_config", "--deepspeed-config"])] = None
    """A DeepSpeed JSON for whatever megagpt does not own."""

    def __post_init__(self) -> None:
        _positive("train", self, "train_steps", "micro_batch_size", "global_batch_size")
        Kernels.parse(self.kernels)  # raises
        require(
            0 <= self.seed < 2**32,
            f"train.seed={self.seed}",
            "must be between 0 and 2^32 - 1",
            "1234 is the default",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved and kept, and what a run goes on from."""

    save: Annotated[str | None, arg(aliases=["--save"])] = None
    """Run folder: checkpoints, metrics.jsonl, TensorBoard, loss curve. Default: a new folder under runs/."""
    load: Annotated[str | None, arg(aliases=["--load"])] = None
    """What to go on from: RUN, RUN@best, RUN@STEP, or the folder of a checkpoint."""
    auto_resume: Annotated[bool, arg(aliases=["--auto-resume"])] = False
    """Go on with the run in --save if it has a checkpoint; start it if not."""
    load_fallback: Annotated[bool, arg(aliases=["--load-fallback"])] = False
    """Where a checkpoint is damaged, take the newest one before it that is whole."""
    save_interval: Annotated[int | None, arg(aliases=["--save-interval"])] = None
    """Steps between checkpoints; default only at the end."""
    async_save: Annotated[bool, arg(aliases=["--async-save"])] = False
    """Write checkpoints while training goes on, from a copy in host memory."""
    keep_last: Annotated[int | None, arg(aliases=["--keep-last"])] = None
    """Keep this many of the newest checkpoints; default all."""
    keep_every: int | None = None
    """Keep those at multiples of this step too."""
    keep_best: bool = False
    """Keep the one with the lowest validation loss too."""

    def __post_init__(self) -> None:
        _positive("checkpoint", self, "save_interval", "keep_last", "keep_every")
        require(
            not self.auto_resume or (self.save is not None and self.load is None),
            f"checkpoint.auto_resume with save={self.save}, load={self.load}",
            "needs to know the run folder, and looks there for what to load",
            "give --save RUN, and no --load",
        )


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """What happens when something goes wrong, and when the time is up."""

    exit_after_minutes: Annotated[float | None, arg(aliases=["--exit-after-minutes"])] = None
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
    skip_steps: str = ""
    """Steps whose batch is not trained on, such as 57,60-62; a rewind adds to them by itself."""
    slow_rank_factor: float = 1.5
    """Name a process that is busy this many times as long as its peers; 0: never."""

    def __post_init__(self) -> None:
        _positive("faults", self, "exit_after_minutes", "heartbeat_timeout_s", "progress_timeout_s", "max_bad_steps")
        _not_negative("faults", self, "spike_zscore", "slow_rank_factor", "max_rewinds")
        skipped_steps(self.skip_steps)  # raises


def skipped_steps(text: str) -> frozenset[int]:
    """The steps that faults.skip_steps names, counted from 1: "57,60-62".  Raises UserError."""
    found: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, _, last = part.partition("-")
        ok = first.isdigit() and (last or first).isdigit() and 1 <= int(first) <= int(last or first)
        require(ok, f"faults.skip_steps={text!r}", f"has {part!r}, which is no step or range", "write 57,60-62")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown and measured, and how often."""

    log_interval: Annotated[int, arg(aliases=["--log-interval"])] = 1
    """Steps between log lines."""
    eval_interval: Annotated[int, arg(aliases=["--eval-interval"])] = 100
    """Steps between validations; one more comes at the end."""
    eval_steps: Annotated[int, arg(aliases=["--eval-steps"])] = 5
    """Global batches of one validation; 0 turns validation off."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (extra: pip install megagpt[wandb])."""

    def __post_init__(self) -> None:
        _positive("log", self, "log_interval", "eval_interval")
        _not_negative("log", self, "eval_steps")


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Switches that help to find what is wrong."""

    overfit_one_batch: bool = False
    """Train on the first batch again and again: the loss must go to 0."""
    check_ranks: bool = False
    """After each step, check that what must be equal across ranks is equal."""
    detect_nan: bool = False
    """Stop at the first module that produces a NaN or Inf, and name it."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    log: LogConfig = field(default_factory=LogConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


def divisors(n: int, limit: int = 256) -> list[int]:
    """The divisors of n up to limit, ascending: what an error message offers."""
    return [d for d in range(1, min(n, limit) + 1) if n % d == 0]


SECTIONS = tuple(f.name for f in fields(RunConfig))
