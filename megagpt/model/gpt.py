"""The model: an ordered list of layers, which one process holds whole or pipeline stages share out.

Shapes: B batch, T time, D model, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.config.kernels import AUTO, Kernels
from megagpt.model.attention import attention_ops
from megagpt.model.block import Block
from megagpt.model.dropout import EMBEDDING_SITE, Dropout
from megagpt.model.init import Init
from megagpt.model.loss import PLAIN, LossTerms, vocab_parallel_cross_entropy
from megagpt.model.norm import Norm
from megagpt.model.position import Sinusoids
from megagpt.parallel.axis import Axis
from megagpt.parallel.embedding import ROW_MULTIPLE, VocabParallelEmbedding, vocab_parallel_logits
from megagpt.parallel.parameter import part_of, replicated, sharded


class Embedding(nn.Module):
    """Token embedding, plus positions where they are learned or sinusoidal, and a norm where there is one.

    Shapes: (tokens_BT, sample_ids_B) → (x_BTD, sample_ids_B).  Comm: forward all-reduce of x over the model axis.
    """

    def __init__(self, config: ModelConfig, axis: Axis, seed: int, kernels: Kernels = AUTO) -> None:
        super().__init__()
        init, table = Init(config, seed), (config.seq_len, config.d_model)
        self.tokens = VocabParallelEmbedding(config.vocab, config.d_model, axis, init.embedding("embedding.tokens"))
        learned = config.position == "learned"
        self.positions = replicated(init.embedding("embedding")("positions", table)) if learned else None
        self.sinusoids = Sinusoids(*table) if config.position == "sinusoidal" else None
        self.norm = Norm(config, init, "embedding.norm", kernels) if config.embedding_norm else None
        self.dropout = Dropout(config.dropout_embedding, seed, EMBEDDING_SITE, kernels)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens_BT, sample_ids_B = inputs
        x_BTD = self.tokens(tokens_BT)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions[: tokens_BT.shape[1]]
        if self.sinusoids is not None:
            x_BTD = x_BTD + self.sinusoids(x_BTD)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return self.dropout(x_BTD, sample_ids_B), sample_ids_B


class Head(nn.Module):
    """Final norm, where there is one, and the output matrix.

    Shapes: (x_BTD, sample_ids_B) → logits_BTV, this rank's columns.  Comm: backward all-reduce over the model axis.
    `tokens` is the embedding whose weight is used: the embedding's own one where it is at hand (tied, one stage), a
    copy that the pipeline keeps equal (tied, several stages), or the head's own matrix (not tied).
    """

    def __init__(
        self,
        config: ModelConfig,
        axis: Axis,
        seed: int,
        kernels: Kernels = AUTO,
        tokens: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.kernels = axis, kernels["cross_entropy"]
        init, vocab = Init(config, seed), config.vocab
        self.scale = config.logit_scale
        self.norm = Norm(config, init, "head.norm", kernels) if config.final_norm else None
        draw = init.embedding("embedding.tokens") if config.tied_embeddings else init.matrix("head.tokens")
        self.tokens = tokens or VocabParallelEmbedding(vocab, config.d_model, axis, draw)
        self.bias = sharded(torch.zeros(vocab), 0, axis, pad_to=ROW_MULTIPLE) if config.bias_head else None

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x_BTD, _ = inputs
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        x_BTD = x_BTD if self.scale == 1.0 else x_BTD * self.scale
        logits_BTV = vocab_parallel_logits(x_BTD, self.tokens.weight, self.axis)
        return logits_BTV if self.bias is None else logits_BTV + self.bias

    def loss(self, logits_BTV: Tensor, labels_BT: Tensor, terms: LossTerms = PLAIN) -> Tensor:
        """Mean cross-entropy in nats per token: a scalar, equal on every rank of the model axis.

        terms: what moves the gradient beside it, and is not in the value, so that the losses of all runs compare.
        The backward pass writes the gradient over the logits, which nothing else needs by then.
        """
        part = part_of(self.tokens.weight)
        loss_BT = vocab_parallel_cross_entropy(
            logits_BTV,
            labels_BT,
            part,
            self.axis,
            label_smoothing=terms.label_smoothing,
            z_loss=terms.z_loss,
            plain_value=True,
            in_place=True,
            kernels=self.kernels,
        )
        return loss_BT.mean()


def ops_used(config: ModelConfig, kernels: Kernels) -> list[str]:
    """The ops of megagpt/ops that training such a model calls."""
    ops = ["norm", "activation", "bias_dropout_add", "cross_entropy", *attention_ops(config, kernels)]
    if config.dropout_embedding > 0 and "dropout" not in ops:
        ops.append("dropout")
    return ops


@dataclass(frozen=True)
class Layer:
    """One entry of the layer list: its canonical name, and what to build (so that a stage builds only its own)."""

    name: str
    kind: type[nn.Module]
    arguments: tuple[Any, ...]

    def build(self) -> nn.Module:
        """The layer itself."""
        return self.kind(*self.arguments)


def layer_list(
    config: ModelConfig, axis: Axis, seed: int, recompute: bool = False, kernels: Kernels = AUTO
) -> list[Layer]:
    """The whole model in order: embedding, blocks.0 …, head."""
    blocks = [Layer(f"blocks.{i}", Block, (config, i, axis, seed, recompute, kernels)) for i in range(config.n_layers)]
    return [
        Layer("embedding", Embedding, (config, axis, seed, kernels)),
        *blocks,
        Layer("head", Head, (config, axis, seed, kernels)),
    ]


class GPT(nn.Module):
    """The layer list in one module: what a run without pipeline stages, evaluation and generation use.

    Shapes: forward(tokens_BT, sample_ids_B) → logits_BTV; with labels_BT → mean loss, a scalar.
    """

    def __init__(
        self, config: ModelConfig, axis: Axis, seed: int = 0, recompute: bool = False, kernels: Kernels = AUTO
    ) -> None:
        super().__init__()
        self.embedding = Embedding(config, axis, seed, kernels)
        self.blocks = nn.ModuleList(Block(config, i, axis, seed, recompute, kernels) for i in range(config.n_layers))
        tied = self.embedding.tokens if config.tied_embeddings else None
        self.head = Head(config, axis, seed, kernels, tokens=tied)

    def forward(
        self,
        tokens_BT: Tensor,
        sample_ids_B: Tensor | None = None,
        labels_BT: Tensor | None = None,
        terms: LossTerms = PLAIN,
    ) -> Tensor:
        if sample_ids_B is None:  # only dropout looks at them
            sample_ids_B = torch.zeros(len(tokens_BT), dtype=torch.int64, device=tokens_BT.device)
        x = self.embedding((tokens_BT, sample_ids_B))
        for block in self.blocks:
            x = block(x)
        logits_BTV = self.head(x)
        return logits_BTV if labels_BT is None else self.head.loss(logits_BTV, labels_BT, terms)
