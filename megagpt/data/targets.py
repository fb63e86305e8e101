"""What a micro-batch's outputs are compared with: labels, how much each counts, and a classifier's answers.

Shapes: B micro_batch_size, T tokens of a row.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Answers(NamedTuple):
    """What a classifier is asked at tokens of a row. values_BT: the class, or the number, float32; 0 elsewhere.

    weights_BT: as those of `Targets`; 0 where nothing is asked.  mates_BT: where in the row the same question ends
    that is asked in another order; -1 where it is asked in one.  examples_BT: which example it is of; -1 for none.
    """

    values_BT: Tensor  # noqa: N815
    weights_BT: Tensor  # noqa: N815
    mates_BT: Tensor  # noqa: N815
    examples_BT: Tensor  # noqa: N815


class Targets(NamedTuple):
    """What the loss compares with: the token after each, and where asked the answers.

    weights_BT: float32, of each label in the mean over a step's B x T; they sum to B x T of the step, so that the
    mean over micro-batches and ranks is that of the labels that count. None: all count alike.
    """

    labels_BT: Tensor  # noqa: N815
    weights_BT: Tensor | None = None  # noqa: N815
    answers: Answers | None = None

    @staticmethod
    def of(found: Targets | Tensor | tuple[Tensor, ...]) -> Targets:
        """From what a loss is handed: labels alone, or what `wire` has."""
        if isinstance(found, Targets):
            return found
        labels_BT, *more = (found,) if isinstance(found, Tensor) else found
        return Targets(labels_BT, more[0] if more else None, Answers(*more[1:]) if more[1:] else None)

    @property
    def wire(self) -> tuple[Tensor, ...]:
        """All that is there, as a plain tuple of tensors."""
        weights = () if self.weights_BT is None else (self.weights_BT,)
        return self.labels_BT, *weights, *(self.answers or ())
