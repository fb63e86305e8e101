"""ALiBi's slopes are those that transformers gives to BLOOM."""

from __future__ import annotations

import pytest
import torch

from megagpt.ops.softmax import alibi_slopes


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 16, 25, 112])
def test_slopes_are_those_of_bloom(n_heads: int):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    bias_H1S = build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)
    torch.testing.assert_close(alibi_slopes(n_heads), bias_H1S[:, 0, 1])  # of the key at position 1: slope x 1


def test_no_heads_have_no_slopes():
    with pytest.raises(ValueError, match="n_heads=0"):
        alibi_slopes(0)
