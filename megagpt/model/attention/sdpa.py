"""torch's scaled_dot_product_attention: keeps no probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.model.attention.implementation import Implementation

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.model.attention.attention import Attention
    from megagpt.model.documents import Documents


class Sdpa(Implementation):
    """No biases of scores; its dropout masks depend on the layout, so that it is not used with dropout."""

    title = "torch's scaled_dot_product_attention"

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

        n_heads, n_kv_heads, T, device = q_BHTK.shape[1], k_BGTK.shape[1], q_BHTK.shape[2], q_BHTK.device
        causal = attention.masks.pattern.kind == "dense" and documents is None
        mask = None if causal else attention.masks.dense(T, device, documents)
        grouped = n_heads != n_kv_heads
        # On CUDA only the flash kernel knows groups; it takes no mask, and 16 bits alone. Elsewhere torch would say
        # nothing and hold all scores.
        if grouped and not (causal and (device.type == "cpu" or q_BHTK.dtype in (torch.float16, torch.bfloat16))):
            k_BGTK, v_BGTK = (x.repeat_interleave(n_heads // n_kv_heads, dim=1) for x in (k_BGTK, v_BGTK))
            grouped = False
        return torch.nn.functional.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
