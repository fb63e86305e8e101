"""A linear classifier of a text's last token, beside the head over the vocabulary.

Of a pair whose order means nothing both orders are asked, and what the blocks make of their last tokens is added up.

Shapes: B rows, T tokens, D model, C classes; one class: a number is asked for (regression).
Source: Radford et al. 2018 (GPT-1), sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.kernels import AUTO, Kernels
from megagpt.data.targets import Answers
from megagpt.model.dropout import Dropout, block_site
from megagpt.parallel.axis import Axis
from megagpt.parallel.parameter import Declared

if TYPE_CHECKING:
    from megagpt.config import ModelConfig


class Classified(NamedTuple):
    """What a head with a classifier gives. products_BTC: of each token with the classifier's matrix.

    bias_C: added once an answer, of however many tokens it is made.
    """

    logits_BTV: Tensor  # noqa: N815
    products_BTC: Tensor  # noqa: N815
    bias_C: Tensor  # noqa: N815


class Classifier(nn.Module):
    """Shapes: x_BTD → products_BTC, bias_C; whole on every rank of the model axis.  Comm: none."""

    def __init__(self, config: ModelConfig, axis: Axis, declared: Declared, kernels: Kernels = AUTO) -> None:
        super().__init__()
        self.weight, self.bias = declared.make("weight", axis), declared.make("bias", axis)
        self.dropout = Dropout(config.dropout_residual, declared.seed, block_site(config.n_layers, 0), kernels)

    def forward(self, x_BTD: Tensor, sample_ids_B: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(self.dropout(x_BTD, sample_ids_B), self.weight), self.bias.clone()


def answer_losses(
    found: Classified, answers: Answers, on_answers: Callable[[Tensor, Tensor], None] | None = None
) -> Tensor:
    """Of each answer its negative log-likelihood, or the square of what it is off, times its weight; 0 elsewhere.

    on_answers: told the examples asked about, (N) int64, and their scores, (N, C).
    Shapes: → (B, T), float32 (float64 for float64 scores).
    """
    products_BTC = found.products_BTC
    if products_BTC.dtype != torch.float64:
        products_BTC = products_BTC.float()
    mates_BT1 = answers.mates_BT.unsqueeze(-1)
    of_mates_BTC = products_BTC.gather(1, mates_BT1.clamp(min=0).expand_as(products_BTC))
    scores_BTC = products_BTC + of_mates_BTC.masked_fill(mates_BT1 < 0, 0.0) + found.bias_C
    if on_answers is not None:
        asked_BT = answers.examples_BT >= 0
        on_answers(answers.examples_BT[asked_BT], scores_BTC.detach()[asked_BT])
    if scores_BTC.shape[-1] == 1:
        loss_BT = (scores_BTC.squeeze(-1) - answers.values_BT).square()
    else:
        loss_BT = F.cross_entropy(scores_BTC.flatten(0, 1), answers.values_BT.long().flatten(), reduction="none")
        loss_BT = loss_BT.view(answers.values_BT.shape)
    return loss_BT * answers.weights_BT
