"""How large each layer is: parameters (logical, and held by one rank), and the matmul FLOPs of a token.

The layer list is [embedding, block 0 … block L-1, head], as in `megagpt/model/gpt.py`.
Letters: V vocabulary, D d_model, I n_heads * d_head, F d_ff, T seq_len, L n_layers, t tensor parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.config import ModelConfig

VOCAB_MULTIPLE = 128  # a rank pads its rows of the vocabulary to this: matrix units want aligned sizes


@dataclass(frozen=True)
class LayerSize:
    """One entry of the layer list.

    params: elements of its logical tensors.
    params_local: what one rank of the model axis holds, padding included.
    flops_per_token: of its weight matmuls and of attention (not halved for causality), forward only.
    """

    name: str
    params: int
    params_local: int
    flops_per_token: int


def layer_sizes(model: ModelConfig, tp: int) -> tuple[LayerSize, ...]:
    """The whole layer list; a tied head has no output matrix of its own (`tied_copy`: what a stage adds)."""
    blocks = tuple(_block(model, i, tp) for i in range(model.n_layers))
    return (_embedding(model, tp), *blocks, _head(model, tp))


def vocab_local(vocab_size: int, tp: int) -> int:
    """Rows of the vocabulary that one rank holds: ceil(V / tp), padded to a multiple of `VOCAB_MULTIPLE`."""
    rows = _ceil_div(vocab_size, tp)
    return _ceil_div(rows, VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def tied_copy(model: ModelConfig, tp: int) -> tuple[int, int]:
    """(logical, local) size of the token matrix that the last of several stages holds beside the first."""
    if not model.tied_embeddings:
        return 0, 0
    return model.vocab * model.d_model, vocab_local(model.vocab, tp) * model.d_model


def _embedding(model: ModelConfig, tp: int) -> LayerSize:
    positions = model.seq_len * model.d_model if model.position == "learned" else 0
    return LayerSize(
        name="embedding",
        params=model.vocab * model.d_model + positions,
        params_local=vocab_local(model.vocab, tp) * model.d_model + positions,
        flops_per_token=0,  # a look-up
    )


def _block(model: ModelConfig, index: int, tp: int) -> LayerSize:
    D, F, I = model.d_model, model.ff_width, model.n_heads * model.head_width  # noqa: E741
    ups = 2 if model.gated else 1
    matrices = D * 3 * I + I * D + ups * D * F + F * D  # qkv, attention output, MLP up (and gate), MLP down
    sharded = matrices + 3 * I + ups * F  # and the biases of the column-parallel layers
    replicated = 2 * D + 2 * _norm(model)  # biases of the row-parallel layers; two norms
    return LayerSize(
        name=f"blocks.{index}",
        params=sharded + replicated,
        params_local=sharded // tp + replicated,
        flops_per_token=2 * matrices + 4 * I * model.seq_len,  # q kᵀ, and probabilities times v: 2 T I each
    )


def _norm(model: ModelConfig) -> int:
    """Gain and bias, or the gain alone."""
    return (2 if model.norm == "layernorm" else 1) * model.d_model


def _head(model: ModelConfig, tp: int) -> LayerSize:
    norm = _norm(model)
    own = 0 if model.tied_embeddings else model.d_model
    return LayerSize(
        name="head",
        params=norm + own * model.vocab,
        params_local=norm + own * vocab_local(model.vocab, tp),
        flops_per_token=2 * model.vocab * model.d_model,
    )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
