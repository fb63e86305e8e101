"""The model: an ordered list of layers, which one process holds whole or pipeline stages share out.

Shapes: B batch, T time, D model, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.kernels import AUTO, Kernels
from megagpt.data.targets import Targets
from megagpt.inventory import layers as inventory
from megagpt.model.block import Block
from megagpt.model.classifier import Classified, Classifier, answer_losses
from megagpt.model.documents import Documents
from megagpt.model.dropout import EMBEDDING_SITE, Dropout
from megagpt.model.loss import PLAIN, LossTerms, vocab_parallel_cross_entropy
from megagpt.model.norm import Norm
from megagpt.model.position import POSITIONS
from megagpt.model.stream import Stream, holds_documents
from megagpt.parallel.axis import Axis
from megagpt.parallel.embedding import VocabParallelEmbedding, vocab_parallel_logits
from megagpt.parallel.parameter import Declared, part_of

if TYPE_CHECKING:
    from megagpt.config import ModelConfig
    from megagpt.config.lora import LoraConfig


class Embedding(nn.Module):
    """Token embedding, plus positions where they are learned or sinusoidal, and a norm where there is one.

    A classifier's delimiters are numbers beyond the vocabulary, each with a learned vector of its own.

    Shapes: stream of tokens_BT → stream of x_BTD.  Comm: forward all-reduce of x over the model axis.
    """

    def __init__(self, config: ModelConfig, axis: Axis, declared: Declared, kernels: Kernels = AUTO) -> None:
        super().__init__()
        self.tokens = VocabParallelEmbedding(declared.at("tokens"), axis)
        self.position = POSITIONS[config.position](config)
        self.positions = declared.make_if_any("positions", axis)
        self.delimiters, self.vocab = declared.make_if_any("delimiters", axis), config.vocab
        self.norm = Norm(config, declared.at("norm"), kernels) if config.embedding_norm else None
        self.dropout = Dropout(config.dropout_embedding, declared.seed, EMBEDDING_SITE, kernels)

    def forward(self, inputs: Stream | tuple[Tensor, ...]) -> Stream:
        stream = Stream.of(inputs)
        x_BTD = self._embedded(stream.x)
        x_BTD = self.position.embed(x_BTD, stream.positions_BT, self.positions)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return stream._replace(x=self.dropout(x_BTD, stream.sample_ids_B))

    def _embedded(self, tokens_BT: Tensor) -> Tensor:
        if self.delimiters is None:
            return self.tokens(tokens_BT)
        beyond_BT = tokens_BT >= self.vocab
        x_BTD = self.tokens(tokens_BT.masked_fill(beyond_BT, 0))
        delimiters_BTD = F.embedding((tokens_BT - self.vocab).clamp(min=0), self.delimiters)
        return torch.where(beyond_BT.unsqueeze(-1), delimiters_BTD, x_BTD)


class Head(nn.Module):
    """Final norm, where there is one, and the output matrix.

    Shapes: stream of x_BTD → logits_BTV, this rank's columns; with a classifier, of packed rows → `Classified`.
    Comm: backward all-reduce over the model axis.
    `tokens` is the embedding whose weight is used: the embedding's own one where it is at hand (tied, one stage), a
    copy that the pipeline keeps equal (tied, several stages: made from what `embedding` declares), or the head's own
    matrix (not tied). `on_answers`: told of each example's answer that a loss is taken of.
    """

    def __init__(
        self,
        config: ModelConfig,
        axis: Axis,
        declared: Declared,
        kernels: Kernels = AUTO,
        embedding: Declared | None = None,
        tokens: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.kernels, self.scale = axis, kernels["cross_entropy"], config.logit_scale
        self.norm = Norm(config, declared.at("norm"), kernels) if config.final_norm else None
        of_tokens = embedding if embedding is not None and config.tied_embeddings else declared
        self.tokens = tokens or VocabParallelEmbedding(of_tokens.at("tokens"), axis)
        self.bias = declared.make_if_any("bias", axis)
        self.classifier = Classifier(config, axis, declared.at("classifier"), kernels) if config.n_classes else None
        self.on_answers: Callable[[Tensor, Tensor], None] | None = None

    def forward(self, inputs: Stream | tuple[Tensor, ...]) -> Tensor | Classified:
        x_BTD = inputs[0]
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        logits_BTV = self._logits(x_BTD)
        if self.classifier is None or not holds_documents(inputs):
            return logits_BTV
        return Classified(logits_BTV, *self.classifier(x_BTD, Stream.of(inputs).sample_ids_B))

    def _logits(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD if self.scale == 1.0 else x_BTD * self.scale
        logits_BTV = vocab_parallel_logits(x_BTD, self.tokens.weight, self.axis)
        return logits_BTV if self.bias is None else logits_BTV + self.bias

    def loss(
        self,
        outputs: Tensor | Classified,
        targets: Tensor | Targets | tuple[Tensor, ...],
        terms: LossTerms = PLAIN,
    ) -> Tensor:
        """Mean cross-entropy in nats per token that counts: a scalar, equal on every rank of the model axis.

        Of a classifier, that of its answers, or the mean square of what they are off, where it has one class.
        terms: what moves the gradient beside it, and is not in the value, so that the losses of all runs compare.
        The backward pass writes the gradient over the logits, which nothing else needs by then.
        """
        targets = Targets.of(targets)
        if not isinstance(outputs, Classified):
            return self._language_loss(outputs, targets, terms)
        assert targets.answers is not None
        loss = answer_losses(outputs, targets.answers, self.on_answers).mean()
        if terms.language == 0.0:
            return loss
        language = terms.language * self._language_loss(outputs.logits_BTV, targets, terms)
        return loss + (language - language.detach())

    def _language_loss(self, logits_BTV: Tensor, targets: Targets, terms: LossTerms) -> Tensor:
        part = part_of(self.tokens.weight)
        loss_BT = vocab_parallel_cross_entropy(
            logits_BTV,
            targets.labels_BT,
            part,
            self.axis,
            label_smoothing=terms.label_smoothing,
            z_loss=terms.z_loss,
            plain_value=True,
            in_place=True,
            kernels=self.kernels,
        )
        return loss_BT.mean() if targets.weights_BT is None else (loss_BT * targets.weights_BT).mean()


@dataclass(frozen=True)
class Blueprint:
    """One entry of the layer list: how to build it (so that a stage builds only its own)."""

    name: str
    kind: type[nn.Module]
    arguments: tuple[Any, ...]

    def build(self) -> nn.Module:
        """The layer itself."""
        return self.kind(*self.arguments)


def layer_list(
    config: ModelConfig,
    axis: Axis,
    seed: int,
    recompute: bool = False,
    kernels: Kernels = AUTO,
    empty: bool = False,
    lora: LoraConfig | None = None,
) -> list[Blueprint]:
    """The whole model in order: embedding, blocks.0 …, head.

    empty: see `Declared`.  lora: with a rank, frozen but for adapters.
    """
    listed = inventory.layers(config, kernels, lora)
    embedding, *blocks, head = (Declared(layer.name, layer.parameters, seed, empty) for layer in listed)
    return [
        Blueprint("embedding", Embedding, (config, axis, embedding, kernels)),
        *(Blueprint(b.name, Block, (config, i, axis, b, recompute, kernels, lora)) for i, b in enumerate(blocks)),
        Blueprint("head", Head, (config, axis, head, kernels, embedding)),
    ]


class GPT(nn.Module):
    """The layer list in one module: what a run without pipeline stages trains.

    Shapes: forward(tokens_BT, sample_ids_B) → logits_BTV, of this rank's part of the vocabulary and without padding: on
    one process all of it, as torch's cross_entropy wants them. With labels_BT, or all `Targets` → mean loss, a scalar.
    With positions_BT rows hold several documents, which do not see each other. empty: see `Declared`.
    """

    def __init__(
        self,
        config: ModelConfig,
        axis: Axis,
        seed: int = 0,
        recompute: bool = False,
        kernels: Kernels = AUTO,
        empty: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        super().__init__()
        embedding, *blocks, head = layer_list(config, axis, seed, recompute, kernels, empty, lora)
        self.embedding = Embedding(*embedding.arguments)
        self.blocks = nn.ModuleList(block.build() for block in blocks)
        self.head = Head(*head.arguments, tokens=self.embedding.tokens if config.tied_embeddings else None)

    def forward(
        self,
        tokens_BT: Tensor,
        sample_ids_B: Tensor | None = None,
        labels_BT: Tensor | Targets | tuple[Tensor, ...] | None = None,
        terms: LossTerms = PLAIN,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        if sample_ids_B is None:  # only dropout looks at them
            sample_ids_B = torch.zeros(len(tokens_BT), dtype=torch.int64, device=tokens_BT.device)
        documents = None if positions_BT is None else Documents(positions_BT)
        stream = self.embedding(Stream(tokens_BT, sample_ids_B, documents=documents))
        for block in self.blocks:
            stream = block(stream)
        outputs = self.head(stream)
        if labels_BT is not None:
            return self.head.loss(outputs, labels_BT, terms)
        logits_BTV = outputs.logits_BTV if isinstance(outputs, Classified) else outputs
        return logits_BTV[..., : part_of(self.head.tokens.weight).length]
