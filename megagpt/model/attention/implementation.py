"""How attention is computed: what an implementation declares, and its arithmetic. No torch to read what it declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.model.attention.attention import Attention
    from megagpt.model.documents import Documents


class Implementation(ABC):
    """One way to compute attention; a file beside this one, and a line in `__init__.py`.

    title: for the table at the start of a run.  adds: what of positions it has a place for (`Position.adds`).
    drops: whether it has attention dropout whose masks do not depend on the layout.
    softmax: whether it calls the op of this name.
    keeps_probabilities: whether the backward pass needs the probabilities stored.
    """

    title: ClassVar[str]
    adds: ClassVar[frozenset[str]] = frozenset()
    drops: ClassVar[bool] = False
    softmax: ClassVar[bool] = False
    keeps_probabilities: ClassVar[bool] = False

    @abstractmethod
    def attend(
        self,
        attention: Attention,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        sample_ids_B: Tensor,
        documents: Documents | None = None,
    ) -> Tensor:
        """Of queries and keys at positions 0 … T - 1 of a row, or of documents in it.  Shapes: → y_BHTK."""
