"""The architecture: what a checkpoint is bound to, and what `megagpt/model` builds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megagpt.config.checks import fraction, not_negative, positive
from megagpt.config.pattern import Pattern
from megagpt.config.values import Short
from megagpt.errors import UserError, divisors, require
from megagpt.model.mlp import MLPS
from megagpt.model.position import POSITIONS
from megagpt.model.position.rotary import SCALINGS

if TYPE_CHECKING:
    PositionName = MLPName = ScalingName = str
else:  # flags and YAML files offer what is listed there
    PositionName, MLPName, ScalingName = Literal[*POSITIONS], Literal[*MLPS], Literal[*SCALINGS]

_MAX_LAYERS = 4096  # the plan lists them one by one


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture."""

    n_layers: Short[int] = 4
    """Transformer blocks."""
    d_model: Short[int] = 192
    """Width of the residual stream."""
    n_heads: Short[int] = 4
    """Attention heads."""
    n_kv_heads: Short[int | None] = None
    """Heads of keys and values, shared by groups of query heads; default n_heads, 1 is multi-query attention."""
    d_head: int | None = None
    """Width of one head; default d_model / n_heads."""
    d_ff: int | None = None
    """Width of the MLP; default 4 * d_model."""
    seq_len: Short[int] = 256
    """Context length in tokens, and the length of a training sample."""
    vocab_size: Short[int | None] = None
    """Tokens of the vocabulary; default the tokenizer's. Padding for tp is added by itself."""
    block: Literal["sequential", "parallel", "parallel_two_norms"] = "sequential"
    """Attention, then MLP; or both from one norm (GPT-J, PaLM), or each from a norm of its own (GPT-NeoX), added."""
    position: PositionName = "learned"
    """Position information: learned or sinusoidal embeddings, or within attention: rotary (RoFormer), ALiBi, relative
    with a projection (Transformer-XL), T5's buckets; or none."""
    rotary_base: float = 10000.0
    """Base of the rotary wavelengths."""
    rotary_fraction: float = 1.0
    """Share of a head's width that rotary turns (GPT-NeoX: 0.25)."""
    rotary_interleaved: bool = False
    """Pair neighbours (GPT-J), not halves (GPT-NeoX, LLaMA)."""
    rotary_factor: float = 1.0
    """Reach so many times further than was trained, by what rotary_scaling says."""
    rotary_scaling: ScalingName = "linear"
    """Divide positions (linear), raise the base (ntk; dynamic: by the length at hand), or divide low frequencies (yarn,
    llama3)."""
    rotary_original_len: int | None = None
    """Context in tokens before rotary_scaling, for dynamic, yarn and llama3; default seq_len / rotary_factor."""
    rotary_beta_fast: float = 32.0
    """yarn: pairs that turn more often within the original context keep their frequency."""
    rotary_beta_slow: float = 1.0
    """yarn: pairs that turn less often have it divided."""
    rotary_truncate: bool = True
    """yarn: whether these bounds lie at whole pairs."""
    rotary_attention_factor: float | None = None
    """yarn: factor of queries and keys; default 0.1 * ln(rotary_factor) + 1."""
    rotary_low_freq_factor: float = 1.0
    """llama3: pairs that turn less often within the original context have their frequency divided."""
    rotary_high_freq_factor: float = 4.0
    """llama3: pairs that turn more often keep it."""
    t5_buckets: int = 32
    """Buckets of T5's relative positions."""
    t5_max_distance: int = 128
    """Distance from which T5's positions share the last bucket."""
    attention: tuple[Pattern, ...] = (Pattern(),)
    """What queries may attend, by layer in turn: dense, window:W (the last W), strided:S (the last S, and every S-th),
    bigbird:B:W:G:R (blocks of B tokens: the last W, the first G, R random ones); GPT-3: dense window:256."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation."""
    norm_position: Literal["pre", "post"] = "pre"
    """Before each sub-block (GPT-2), or after the sum with the residual (GPT-1)."""
    final_norm: bool = True
    """A norm before the head."""
    embedding_norm: bool = False
    """A norm after the embedding (BLOOM)."""
    norm_eps: float = 1e-5
    """Epsilon of the norms."""
    activation: Literal["gelu_tanh", "gelu", "relu", "relu2", "swiglu", "geglu"] = "gelu_tanh"
    """MLP activation: GPT-2's tanh form, the exact GELU, ReLU, its square, or a gated unit (SiLU or GELU gate)."""
    mlp: MLPName = "dense"
    """The matrices of the MLP: dense, or products of fewer parameters."""
    mlp_rank: int | None = None
    """Rank of low_rank matrices."""
    mlp_blocks: int | None = None
    """Blocks of each of the two factors of monarch matrices."""
    bias_attention: bool = True
    """Biases of the attention's projections."""
    bias_mlp: bool = True
    """Biases of the MLP."""
    bias_norm: bool = True
    """Biases of LayerNorms."""
    bias_head: bool = False
    """A bias of each token's logit (GPT-J)."""
    tied_embeddings: bool = True
    """Use the token embedding as output matrix too."""
    logit_scale: float = 1.0
    """Factor of the logits (PaLM: 1 / sqrt(d_model))."""
    dropout_embedding: float = 0.0
    """Dropout on the embeddings."""
    dropout_attention: float = 0.0
    """Dropout on the attention probabilities."""
    dropout_residual: float = 0.0
    """Dropout on what each sub-block adds to the residual stream."""
    n_classes: int = 0
    """Outputs of a linear map of a text's last token, beside the head, with three learned delimiters; 0: none. A task
    of classification sets it (finetune.task)."""
    init: Literal["gpt2", "normal", "small", "fan_in"] = "gpt2"
    """Initial weights: N(0, init_std) with residual projections / sqrt(2 * n_layers) (gpt2) or not (normal, GPT-1);
    sqrt(2 / (5 * d_model)) with residual projections 2 / (n_layers * sqrt(d_model)) (small, GPT-NeoX);
    1 / sqrt(inputs), embeddings of 1 (fan_in, PaLM)."""
    init_std: float = 0.02
    """Standard deviation of initial weights, where init uses it."""

    def __post_init__(self) -> None:
        patterns = tuple(Pattern.parse(p) if isinstance(p, str) else p for p in self.attention)
        object.__setattr__(self, "attention", patterns)
        positive(
            "model",
            self,
            *("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "seq_len", "vocab_size"),
            *("norm_eps", "init_std", "logit_scale", "rotary_base", "rotary_fraction", "rotary_factor"),
            *("rotary_original_len", "rotary_beta_fast", "rotary_beta_slow", "rotary_attention_factor"),
            *("rotary_low_freq_factor", "rotary_high_freq_factor"),
            *("t5_buckets", "t5_max_distance", "mlp_rank", "mlp_blocks"),
        )
        not_negative("model", self, "n_classes")
        require(
            self.n_layers <= _MAX_LAYERS,
            f"model.n_layers={self.n_layers}",
            f"must be at most {_MAX_LAYERS}",
            "published models have up to 200",
            "model.n_layers",
        )
        fraction("model", self, "dropout_embedding", "dropout_attention", "dropout_residual")
        require(
            self.d_head is not None or self.d_model % self.n_heads == 0,
            f"model.d_model={self.d_model} with model.n_heads={self.n_heads}",
            "must divide evenly",
            f"try n_heads in {divisors(self.d_model)[:12]}, or set d_head",
            *("model.d_model", "model.n_heads"),
        )
        require(
            self.n_heads % self.kv_heads == 0,
            f"model.n_kv_heads={self.kv_heads} with model.n_heads={self.n_heads}",
            "must share keys between groups of equal size",
            f"use one of {', '.join(map(str, divisors(self.n_heads)))}",
            *("model.n_kv_heads", "model.n_heads"),
        )
        require(len(self.attention) > 0, "model.attention", "is empty", "use dense", "model.attention")
        for pattern in self.attention:
            pattern.require_fits(self.seq_len)
        require(
            self.norm_position == "pre" or self.block == "sequential",
            f"model.norm_position=post with model.block={self.block}",
            "has no sum to normalise after attention: a parallel block adds attention and MLP at once",
            "use block=sequential, or norm_position=pre",
            *("model.norm_position", "model.block"),
        )
        self._check_kinds()

    def _check_kinds(self) -> None:
        """What the chosen kinds of position and MLP want, and settings that another kind alone has."""
        POSITIONS[self.position](self).check()
        for kind, of_mlp in MLPS.items():
            for name in of_mlp.settings:
                value = getattr(self, name)
                require(
                    value is None or kind == self.mlp,
                    f"model.mlp={self.mlp} with model.{name}={value}",
                    f"says what only {kind} has",
                    f"set model.mlp={kind}, or leave it out",
                    *(f"model.{name}", "model.mlp"),
                )
        MLPS[self.mlp](self).check()

    @property
    def gated(self) -> bool:
        """Whether the MLP's hidden width comes twice, as gate and as value."""
        return self.activation.endswith("glu")

    @property
    def kv_heads(self) -> int:
        """n_kv_heads, resolved."""
        return self.n_kv_heads or self.n_heads

    @property
    def grouped(self) -> bool:
        """Whether several query heads share keys and values."""
        return self.kv_heads < self.n_heads

    @property
    def head_width(self) -> int:
        """d_head, resolved."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        """d_ff, resolved."""
        return self.d_ff or 4 * self.d_model

    @property
    def rotary_width(self) -> int:
        """How much of a head's width rotary turns."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def vocab(self) -> int:
        """vocab_size, once the tokenizer has set it."""
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not known yet; set it, or give a tokenizer")
        return self.vocab_size

    def pattern(self, layer: int) -> Pattern:
        """Which keys a query of this layer may attend."""
        return self.attention[layer % len(self.attention)]
