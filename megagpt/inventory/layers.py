"""The layers of a model: what each holds, computes and keeps. Modules are built from this, everyone else reads it.

The list is [embedding, blocks.0 … , head]. No torch.
Letters: V vocabulary, D d_model, H n_heads, I n_heads * d_head, J n_kv_heads * d_head, F d_ff, T seq_len, tp tensor
parallel size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megagpt.config.kernels import AUTO, Kernels
from megagpt.inventory.attention import attention_runs
from megagpt.inventory.init import embedding_init, matrix_init, matrix_std, residual_std
from megagpt.inventory.lora import adapters, frozen, kept_by_adapters
from megagpt.inventory.parameter import ONES, ZEROS, Kept, Parameter, Parameters, column, row, under
from megagpt.model.attention import IMPLEMENTATIONS
from megagpt.model.mlp import MLPS
from megagpt.model.position import POSITIONS

if TYPE_CHECKING:
    from megagpt.config import ModelConfig
    from megagpt.config.lora import LoraConfig

VOCAB_MULTIPLE = 128  # a rank pads its rows of the vocabulary to this: matrix units want aligned sizes
N_DELIMITERS = 3  # of a classifier: what begins a text, stands between two, and ends it
TIED = "embedding.tokens.weight"  # the canonical name of the matrix that a tied head uses too


@dataclass(frozen=True)
class Layer:
    """One entry of the layer list.

    parameters: by name within the layer.  flops_per_token: forward, of its maps and of attention.  kept: numbers of a
    token that the backward pass needs.  frozen_flops: the part of flops_per_token that is of maps without a gradient.
    """

    name: str
    parameters: Parameters
    flops_per_token: int
    kept: tuple[Kept, ...] = ()
    frozen_flops: int = 0

    @property
    def params(self) -> int:
        """Elements of its logical tensors."""
        return sum(parameter.size for parameter in self.parameters.values())


def layers(model: ModelConfig, kernels: Kernels = AUTO, lora: LoraConfig | None = None) -> tuple[Layer, ...]:
    """The whole list. A tied head has no output matrix of its own: the last of several stages holds a copy (`TIED`).

    lora: with a rank, adapters are in it, and all else is frozen.
    """
    kinds = [block(model, i, kernels) for i in range(min(model.n_layers, layer_period(model)))]
    blocks = [kinds[i % len(kinds)] for i in range(model.n_layers)]
    named = (Layer(f"blocks.{i}", b.parameters, b.flops_per_token, b.kept) for i, b in enumerate(blocks))
    listed = (embedding(model), *named, head(model))
    return listed if lora is None or lora.rank is None else tuple(_adapted(layer, model, lora) for layer in listed)


def _adapted(layer: Layer, model: ModelConfig, lora: LoraConfig) -> Layer:
    """The same with adapters beside its maps, which are frozen as all else is."""
    added, is_block = adapters(layer.parameters, lora), layer.name.startswith("blocks.")
    of_maps = sum(p.flops_per_token for p in layer.parameters.values()) if is_block else layer.flops_per_token
    flops = layer.flops_per_token + sum(p.flops_per_token for p in added.values())
    kept = kept_by_adapters(model, layer.parameters, lora) if is_block else ()
    if layer.name == "head":
        kept = (Kept("input of the frozen output matrix", -model.d_model, ways=1),)
    return Layer(layer.name, {**frozen(layer.parameters), **added}, flops, (*layer.kept, *kept), of_maps)


def layer_period(model: ModelConfig) -> int:
    """After how many blocks they begin to be alike again."""
    return math.lcm(len(model.attention), POSITIONS[model.position].period)


def canonical(model: ModelConfig) -> dict[str, Parameter]:
    """All logical tensors by canonical name, in the order of the model; a tied one once."""
    return {f"{layer.name}.{name}": p for layer in layers(model) for name, p in layer.parameters.items()}


def vocab_local(model: ModelConfig, tp: int) -> int:
    """Rows of the vocabulary that one rank holds: ceil(V / tp), padded to a multiple of `VOCAB_MULTIPLE`."""
    return _token_table(model)["weight"].local_size(tp) // model.d_model


def embedding(model: ModelConfig) -> Layer:
    """Tokens, positions where these are learned here, a norm where there is one."""
    parameters = {**POSITIONS[model.position](model).embedding_parameters(), **under("tokens", _token_table(model))}
    if model.embedding_norm:
        parameters |= under("norm", norm(model))
    if model.n_classes:
        parameters |= {"delimiters": Parameter((N_DELIMITERS, model.d_model), "table", embedding_init(model))}
    return Layer("embedding", parameters, flops_per_token=0)  # look-ups


def block(model: ModelConfig, layer: int, kernels: Kernels = AUTO) -> Layer:
    """Attention, MLP and their norms."""
    mlp = MLPS[model.mlp](model)
    parameters = {
        **under("norm_1", norm(model)),
        **under("attention", attention(model, layer)),
        **({} if model.block == "parallel" else under("norm_2", norm(model))),
        **under("mlp.up", mlp.up()),
        **under("mlp.down", mlp.down()),
    }
    flops = sum(p.flops_per_token for p in parameters.values()) + score_flops(model, layer)
    streams = {"sequential": 4, "parallel": 2, "parallel_two_norms": 3}[model.block]
    hidden = (3 if model.gated else 2) * model.ff_width  # before (twice with a gate) and after its activation
    kept = (
        Kept("residual stream and norms", streams * model.d_model, ways=1),
        *_attention_kept(model, layer, kernels),
        Kept("hidden width of the MLP", hidden),
        *mlp.kept(),
    )
    return Layer(f"blocks.{layer}", parameters, flops, kept)


def head(model: ModelConfig) -> Layer:
    """The final norm and the output matrix, which is the embedding's where it is tied."""
    parameters = under("norm", norm(model)) if model.final_norm else {}
    if not model.tied_embeddings:
        matrix = Parameter((model.vocab, model.d_model), "table", matrix_init(model, model.d_model), **_BY_TOKEN)
        parameters |= under("tokens", {"weight": matrix})
    if model.bias_head:
        parameters |= {"bias": Parameter((model.vocab,), "vector", ZEROS, **_BY_TOKEN)}
    if model.n_classes:
        parameters |= under("classifier", _classifier(model))
    kept = (Kept("input and output of the final norm", 2 * model.d_model, ways=1),)
    return Layer("head", parameters, 2 * model.vocab * model.d_model, kept)


def attention(model: ModelConfig, layer: int) -> dict[str, Parameter]:
    """Projections, and what the positions learn. A head's query, key and value lie side by side, unless heads share."""
    D, K, bias, std = model.d_model, model.head_width, model.bias_attention, matrix_std(model, model.d_model)
    inner = model.n_heads * K
    if model.grouped:
        ours = {
            **under("q", column(D, inner, std, bias=bias, heads=model.n_heads)),
            **under("kv", column(D, 2 * model.kv_heads * K, std, bias=bias, heads=model.kv_heads, maps_per_head=2)),
        }
    else:
        ours = under("qkv", column(D, 3 * inner, std, bias=bias, heads=model.n_heads, maps_per_head=3))
    ours |= under("out", row(inner, D, residual_std(model, inner), bias=bias))
    position = POSITIONS[model.position](model, layer)
    return ours | under(position.part, position.attention_parameters())


def norm(model: ModelConfig) -> dict[str, Parameter]:
    """Gain and bias, or the gain alone."""
    shape = (model.d_model,)
    bias = {"bias": Parameter(shape, "vector", ZEROS)} if model.norm == "layernorm" and model.bias_norm else {}
    return {"weight": Parameter(shape, "vector", ONES)} | bias


def score_flops(model: ModelConfig, layer: int) -> int:
    """FLOPs of q kᵀ and of the probabilities times v, forward, for a token of this layer: 2 T I each.

    Dense attention counts in full, though a causal one needs half of it (Chowdhery et al. 2022, appendix B); a pattern
    counts the share of the causal pairs that it lets through. Transformer-XL's scores by position are 2 T I more.
    """
    T, I = model.seq_len, model.n_heads * model.head_width  # noqa: E741
    products = POSITIONS[model.position].score_products
    return 4 * products * I * model.pattern(layer).rule.attended_pairs(T) // (T + 1)


def _attention_kept(model: ModelConfig, layer: int, kernels: Kernels) -> tuple[Kept, ...]:
    """q, k, v and the output; probabilities where they are stored, and again after dropout."""
    I, J = model.n_heads * model.head_width, model.kv_heads * model.head_width  # noqa: E741
    dropping = model.dropout_attention > 0
    runs = IMPLEMENTATIONS[attention_runs(kernels["attention"], model, layer, dropping)]
    probabilities = runs.keeps_probabilities * (1 + dropping) * model.n_heads * model.seq_len
    return (
        Kept("queries and output", 2 * I),
        Kept("keys and values", 2 * J, ways=model.kv_heads),
        Kept("attention probabilities", probabilities),
        *POSITIONS[model.position](model, layer).kept(),
    )


def _classifier(model: ModelConfig) -> dict[str, Parameter]:
    """A linear map to the classes, whole on every rank; its dropout and its flops are too few to count."""
    weight = Parameter((model.n_classes, model.d_model), "table", matrix_init(model, model.d_model))
    return {"weight": weight, "bias": Parameter((model.n_classes,), "vector", ZEROS)}


_BY_TOKEN: dict[str, Any] = {"sharded": 0, "pad_to": VOCAB_MULTIPLE}


def _token_table(model: ModelConfig) -> dict[str, Parameter]:
    return {"weight": Parameter((model.vocab, model.d_model), "table", embedding_init(model), **_BY_TOKEN)}
