"""torch's FlexAttention: skips the blocks that a pattern leaves out; trains on a GPU alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.model.attention.implementation import Implementation

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.model.attention.attention import Attention
    from megagpt.model.documents import Documents


class Flex(Implementation):
    """Has ALiBi's slopes; no learned biases of scores, and no dropout."""

    title = "torch's FlexAttention"
    adds = frozenset({"slopes"})

    def attend(
        self,
        attention: Attention,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        sample_ids_B: Tensor,
        documents: Documents | None = None,
    ) -> Tensor:
        import torch  # computes: what is declared is read without it
        from torch.nn.attention.flex_attention import flex_attention  # likewise

        device = q_BHTK.device
        slopes_H = attention.position.slopes(attention.heads, device)

        def alibi(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            assert slopes_H is not None
            return score + slopes_H[head] * (key - query)

        # Uncompiled, it holds all scores: what a CPU is given, where only its results count.
        run = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
        blocks = attention.masks.blocks(q_BHTK.shape[2], device, documents)
        score_mod, grouped = None if slopes_H is None else alibi, q_BHTK.shape[1] != k_BGTK.shape[1]
        return run(q_BHTK, k_BGTK, v_BGTK, score_mod=score_mod, block_mask=blocks, enable_gqa=grouped)  # type: ignore[return-value]
