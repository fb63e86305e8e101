"""The steps of attention, a block of queries at a time: memory that grows with T instead of T²."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megagpt.model.attention.grouped import grouped_scores, weighted_values
from megagpt.model.attention.implementation import Implementation

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.model.attention.attention import Attention
    from megagpt.model.documents import Documents

QUERIES = 128  # of a block: its scores stay in cache, and its products are large enough


class Blocks(Implementation):
    """Keys that no query of a block may see are left out: those after it, and before its window.

    The backward pass computes the probabilities of a block again, with the same dropout.
    """

    title = "softmax's steps, by blocks of queries"
    adds = frozenset({"slopes"})
    drops = True
    softmax = True

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
        from torch.autograd.function import once_differentiable  # likewise

        T, window = q_BHTK.shape[2], attention.masks.rule.window
        blocks = []  # queries, and the keys that they may see
        for begin in range(0, T, QUERIES):
            end = min(begin + QUERIES, T)
            first = 0 if window is None else max(0, begin - window + 1) // 8 * 8  # whole packs, for dropout
            blocks.append((slice(begin, end), slice(first, end)))

        class ByBlocks(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
                ctx.save_for_backward(q_BHTK, k_BGTK, v_BGTK)
                y_BHTK = torch.empty_like(q_BHTK.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
                for at in blocks:
                    queries, keys = at
                    q, k, v = q_BHTK[:, :, queries], k_BGTK[:, :, keys], v_BGTK[:, :, keys]
                    y_BHTK[:, :, queries] = self._block(attention, q, k, v, sample_ids_B, documents, T, *at)
                return y_BHTK

            @staticmethod
            @once_differentiable
            def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator
                (dy_BHTK,), (q_BHTK, k_BGTK, v_BGTK) = grads, ctx.saved_tensors
                sums = torch.promote_types(k_BGTK.dtype, torch.float32)  # over blocks
                dq_BHTK = torch.empty_like(q_BHTK)
                dk_BGTK, dv_BGTK = (torch.zeros_like(x, dtype=sums) for x in (k_BGTK, v_BGTK))
                for at in blocks:
                    queries, keys = at
                    parts = q_BHTK[:, :, queries], k_BGTK[:, :, keys], v_BGTK[:, :, keys]
                    q, k, v = (part.detach().requires_grad_() for part in parts)
                    with torch.enable_grad():
                        y = self._block(attention, q, k, v, sample_ids_B, documents, T, *at)
                    dq, dk, dv = torch.autograd.grad(y, (q, k, v), dy_BHTK[:, :, queries])
                    dq_BHTK[:, :, queries] = dq
                    dk_BGTK[:, :, keys] += dk
                    dv_BGTK[:, :, keys] += dv
                return dq_BHTK, dk_BGTK.to(k_BGTK.dtype), dv_BGTK.to(v_BGTK.dtype)

        return ByBlocks.apply(q_BHTK, k_BGTK, v_BGTK)  # type: ignore[return-value]

    def _block(
        self,
        attention: Attention,
        q_BHRK: Tensor,
        k_BGSK: Tensor,
        v_BGSK: Tensor,
        sample_ids_B: Tensor,
        documents: Documents | None,
        T: int,
        queries: slice,
        keys: slice,
    ) -> Tensor:
        """Of R queries and S keys, which end with the last of these queries, of T.

        Shapes: → y_BHRK.
        """
        import torch  # likewise

        from megagpt.ops.softmax import attention_softmax  # likewise

        device, rule = q_BHRK.device, attention.masks.rule
        mask, between = None, attention.masks.between
        if documents is not None:
            positions_BT, numbers_BT = documents.positions_BT, documents.numbers_BT
            same_BRS = numbers_BT[:, queries, None] == numbers_BT[:, None, keys]
            mask = (between(positions_BT[:, queries], positions_BT[:, keys]) & same_BRS).unsqueeze(1)
        elif rule.needs_mask:
            positions_T = torch.arange(T, device=device)
            mask = between(positions_T[queries], positions_T[keys])[None, None]
        p_BHRS = attention_softmax(
            grouped_scores(q_BHRK, k_BGSK),
            scale=1 / math.sqrt(attention.d_head),
            causal=True,
            window=rule.window,
            mask=mask,
            slopes_H=attention.position.slopes(attention.heads, device),
            kernels=attention.softmax_kernels,
        )
        offset = (attention.heads.start * T + queries.start) * T + keys.start
        return weighted_values(attention.dropout(p_BHRS, sample_ids_B, offset, (T, T)), v_BGSK)
