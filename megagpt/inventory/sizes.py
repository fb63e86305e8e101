"""How large each layer is: parameters (logical, and held by one rank), and the matmul FLOPs of a token.

The layer list is [embedding, block 0 … block L-1, head], as in `megagpt/model/gpt.py`.
Letters: V vocabulary, D d_model, H n_heads, I n_heads * d_head, J n_kv_heads * d_head, F d_ff, T seq_len, t tensor
parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megagpt.config import ModelConfig
from megagpt.inventory.attended import attended_pairs
from megagpt.inventory.factorised_sizes import mlp_matrix_flops, mlp_matrix_params

VOCAB_MULTIPLE = 128  # a rank pads its rows of the vocabulary to this: matrix units want aligned sizes


@dataclass(frozen=True)
class LayerSize:
    """One entry of the layer list.

    params: elements of its logical tensors.
    params_local: what one rank of the model axis holds, padding included.
    flops_per_token: of its weight matmuls and of attention, forward only, see `attention_flops_per_token`.
    """

    name: str
    params: int
    params_local: int
    flops_per_token: int


def layer_sizes(model: ModelConfig, tp: int) -> tuple[LayerSize, ...]:
    """The whole layer list; a tied head has no output matrix of its own (`tied_copy`: what a stage adds)."""
    attention, mlp, norms = _attention(model, tp), _mlp(model, tp), _whole(_norms_of_block(model) * _norm(model))
    parts = (attention, mlp, norms)
    n_patterns = len(model.attention)
    scores = [attention_flops_per_token(model, layer) for layer in range(min(n_patterns, model.n_layers))]
    blocks = tuple(
        LayerSize(
            name=f"blocks.{i}",
            params=sum(part.params for part in parts),
            params_local=sum(part.params_local for part in parts),
            flops_per_token=sum(part.matmul_flops for part in parts) + scores[i % n_patterns],
        )
        for i in range(model.n_layers)
    )
    return (_embedding(model, tp), *blocks, _head(model, tp))


def attention_flops_per_token(model: ModelConfig, layer: int) -> int:
    """FLOPs of q kᵀ and of the probabilities times v, forward, for a token of this layer: 2 T I each.

    Dense attention counts in full, though a causal one needs half of it (Chowdhery et al. 2022, appendix B); a pattern
    counts the share of the causal pairs that it lets through. Transformer-XL's scores by position are 2 T I more. Its
    projection of the T positions is left out: it is done once for all sequences of a micro-batch.
    """
    T, I = model.seq_len, model.n_heads * model.head_width  # noqa: E741
    products = 3 if model.position == "transformer_xl" else 2
    return 4 * products * I * attended_pairs(model.pattern(layer), T) // (T + 1)


def vocab_local(vocab_size: int, tp: int) -> int:
    """Rows of the vocabulary that one rank holds: ceil(V / tp), padded to a multiple of `VOCAB_MULTIPLE`."""
    rows = _ceil_div(vocab_size, tp)
    return _ceil_div(rows, VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def tied_copy(model: ModelConfig, tp: int) -> tuple[int, int]:
    """(logical, local) size of the token matrix that the last of several stages holds beside the first."""
    if not model.tied_embeddings:
        return 0, 0
    return model.vocab * model.d_model, vocab_local(model.vocab, tp) * model.d_model


class _Part(NamedTuple):
    """Of a block. matmul_flops: of a token through its matrices, forward."""

    params: int
    params_local: int
    matmul_flops: int


def _attention(model: ModelConfig, tp: int) -> _Part:
    """Projections, biases, and what the relative positions learn."""
    D, H, K, bias = model.d_model, model.n_heads, model.head_width, int(model.bias_attention)
    I, J = H * K, model.kv_heads * K  # noqa: E741
    by_heads = D * I + bias * I + I * D  # q and out
    if model.position == "transformer_xl":
        by_heads += D * I + 2 * I  # the projection of the positions, and two biases a head
    elif model.position == "t5":
        by_heads += model.t5_buckets * H
    kv = 2 * J * (D + bias)
    kv_local = kv // tp if model.kv_heads % tp == 0 else kv  # with fewer heads than ranks, each rank holds them all
    out_bias = bias * D
    return _Part(by_heads + kv + out_bias, by_heads // tp + kv_local + out_bias, 2 * (2 * D * I + 2 * D * J))


def _mlp(model: ModelConfig, tp: int) -> _Part:
    """Up (twice where gated) and down, dense or factorised, and their biases."""
    D, F, bias = model.d_model, model.ff_width, int(model.bias_mlp)
    factors = (model.mlp, D, F, model.mlp_rank, model.mlp_blocks)
    back = (model.mlp, F, D, model.mlp_rank, model.mlp_blocks)
    ups = 2 if model.gated else 1
    up, up_local = mlp_matrix_params(*factors, tp, "column")
    down, down_local = mlp_matrix_params(*back, tp, "row")
    flops = ups * mlp_matrix_flops(*factors, "column") + mlp_matrix_flops(*back, "row")
    return _Part(
        params=ups * up + down + bias * (ups * F + D),
        params_local=ups * up_local + down_local + bias * (ups * F // tp + D),
        matmul_flops=flops,
    )


def _whole(params: int) -> _Part:
    """What every rank holds."""
    return _Part(params, params, 0)


def _norms_of_block(model: ModelConfig) -> int:
    return 1 if model.block == "parallel" else 2


def _norm(model: ModelConfig) -> int:
    """Gain and bias, or the gain alone."""
    has_bias = model.norm == "layernorm" and model.bias_norm
    return (2 if has_bias else 1) * model.d_model


def _embedding(model: ModelConfig, tp: int) -> LayerSize:
    whole = model.seq_len * model.d_model if model.position == "learned" else 0
    whole += _norm(model) if model.embedding_norm else 0
    return LayerSize(
        name="embedding",
        params=model.vocab * model.d_model + whole,
        params_local=vocab_local(model.vocab, tp) * model.d_model + whole,
        flops_per_token=0,  # a look-up
    )


def _head(model: ModelConfig, tp: int) -> LayerSize:
    norm = _norm(model) if model.final_norm else 0
    columns = (0 if model.tied_embeddings else model.d_model) + int(model.bias_head)  # a token's own numbers
    return LayerSize(
        name="head",
        params=norm + columns * model.vocab,
        params_local=norm + columns * vocab_local(model.vocab, tp),
        flops_per_token=2 * model.vocab * model.d_model,
    )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
