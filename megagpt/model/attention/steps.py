"""The plain steps of attention around the fused softmax: scores, softmax, dropout, values. Has all there is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megagpt.model.attention.grouped import weighted_values
from megagpt.model.attention.implementation import Implementation

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.model.attention.attention import Attention
    from megagpt.model.documents import Documents


class Steps(Implementation):
    """Keeps the probabilities, before and after dropout."""

    title = "softmax's steps"
    adds = frozenset({"slopes", "bias", "relative"})
    drops = True
    softmax = True
    keeps_probabilities = True

    def attend(
        self,
        attention: Attention,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        sample_ids_B: Tensor,
        documents: Documents | None = None,
    ) -> Tensor:
        from megagpt.ops.softmax import attention_softmax  # computes: what is declared is read without torch

        T, device, masks = q_BHTK.shape[2], q_BHTK.device, attention.masks
        masked = masks.rule.needs_mask or documents is not None
        scores_BHTT, scale = self._scores(attention, q_BHTK, k_BGTK)
        p_BHTT = attention_softmax(
            scores_BHTT,
            scale=scale,
            causal=True,
            window=masks.rule.window,
            mask=masks.dense(T, device, documents) if masked else None,
            slopes_H=attention.position.slopes(attention.heads, device),
            kernels=attention.softmax_kernels,
        )
        p_BHTT = attention.dropout(p_BHTT, sample_ids_B, offset=attention.heads.start * T * T)
        return weighted_values(p_BHTT, v_BGTK)

    def _scores(self, attention: Attention, q_BHTK: Tensor, k_BGTK: Tensor) -> tuple[Tensor, float]:
        """Scores, and what they still must be multiplied by."""
        import torch  # likewise

        scale = 1 / math.sqrt(attention.d_head)
        scores_BHTT = attention.learned(attention.position.scores, q_BHTK, k_BGTK)
        if attention.position.adds == "bias":  # scaled here, in the one rounding of the sum
            return torch.add(attention.learned(attention.position.bias, q_BHTK), scores_BHTT, alpha=scale), 1.0
        return scores_BHTT, scale
