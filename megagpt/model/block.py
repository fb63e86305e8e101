"""One transformer block: norms, attention and MLP, and the residual stream that they are added to."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.config import ModelConfig
from megagpt.config.kernels import AUTO, Kernels
from megagpt.model.attention import Attention
from megagpt.model.dropout import Dropout, block_site
from megagpt.model.init import Init
from megagpt.model.mlp import MLP
from megagpt.model.norm import Norm
from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import copy_to, reduce_from


class Block(nn.Module):
    """Attention and MLP as config.block and config.norm_position order them, with dropout on what each adds.

    Shapes: (x_BTD, sample_ids_B) → (x_BTD, sample_ids_B): the ids travel along, for the dropout masks.
    Comm: forward two all-reduces of x over the model axis; backward two. One each where attention and MLP read the same
    norm and nothing stands between their sums and the stream: parallel, without biases and dropout, as PaLM is.
    Source: Radford et al. 2018 (post-norm), 2019 (pre-norm); Wang & Komatsuzaki 2021 (parallel); Shoeybi et al. 2019,
    section 3.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        axis: Axis,
        seed: int,
        recompute: bool = False,
        kernels: Kernels = AUTO,
    ) -> None:
        super().__init__()
        name, init = f"blocks.{layer}", Init(config, seed)
        self.recompute = recompute
        self.axis = axis
        self.steps = _STEPS["post" if config.norm_position == "post" else config.block]
        merged = _is_one_sum(config)
        if merged:
            self.steps = _parallel_in_one_sum
        self.norm_1 = Norm(config, init, f"{name}.norm_1", kernels)
        self.attention = Attention(config, layer, axis, init, f"{name}.attention", kernels, partial=merged)
        self.norm_2 = None if config.block == "parallel" else Norm(config, init, f"{name}.norm_2", kernels)
        self.mlp = MLP(config, axis, init, f"{name}.mlp", kernels, partial=merged)
        self.dropout_1 = Dropout(config.dropout_residual, seed, block_site(layer, 1), kernels)
        self.dropout_2 = Dropout(config.dropout_residual, seed, block_site(layer, 2), kernels)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x_BTD, sample_ids_B = inputs
        if self.recompute and self.training:
            # No random state to preserve: dropout masks are a function of the ids.
            x_BTD = checkpoint(self.steps, self, x_BTD, sample_ids_B, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BTD = self.steps(self, x_BTD, sample_ids_B)
        return x_BTD, sample_ids_B


def _sequential(block: Block, x_BTD: Tensor, sample_ids_B: Tensor) -> Tensor:
    """x + attention(norm_1(x)), then x + mlp(norm_2(x))."""
    assert block.norm_2 is not None
    h_BTD = block.norm_1(x_BTD)
    if block.dropout_1.active:
        x_BTD = block.attention(h_BTD, sample_ids_B, epilogue=block.dropout_1.join(x_BTD, sample_ids_B))
        h_BTD = block.norm_2(x_BTD)
    else:
        h_BTD, x_BTD = block.norm_2(block.attention(h_BTD, sample_ids_B), x_BTD)
    return block.mlp(h_BTD, epilogue=block.dropout_2.join(x_BTD, sample_ids_B))


def _post(block: Block, x_BTD: Tensor, sample_ids_B: Tensor) -> Tensor:
    """norm_1(x + attention(x)), then norm_2(x + mlp(x))."""
    assert block.norm_2 is not None
    if block.dropout_1.active:
        x_BTD = block.norm_1(block.attention(x_BTD, sample_ids_B, epilogue=block.dropout_1.join(x_BTD, sample_ids_B)))
        return block.norm_2(block.mlp(x_BTD, epilogue=block.dropout_2.join(x_BTD, sample_ids_B)))
    x_BTD, _ = block.norm_1(block.attention(x_BTD, sample_ids_B), x_BTD)
    x_BTD, _ = block.norm_2(block.mlp(x_BTD), x_BTD)
    return x_BTD


def _parallel(block: Block, x_BTD: Tensor, sample_ids_B: Tensor) -> Tensor:
    """x + attention(norm_1(x)) + mlp(norm_1(x)), or with norm_2(x) for the MLP where there is one."""
    h_BTD = block.norm_1(x_BTD)
    g_BTD = h_BTD if block.norm_2 is None else block.norm_2(x_BTD)
    x_BTD = block.attention(h_BTD, sample_ids_B, epilogue=block.dropout_1.join(x_BTD, sample_ids_B))
    return block.mlp(g_BTD, epilogue=block.dropout_2.join(x_BTD, sample_ids_B))


def _is_one_sum(config: ModelConfig) -> bool:
    plain = not (config.bias_attention or config.bias_mlp or config.dropout_residual) and config.mlp == "dense"
    return plain and config.block == "parallel" and config.norm_position == "pre"


def _parallel_in_one_sum(block: Block, x_BTD: Tensor, sample_ids_B: Tensor) -> Tensor:
    """The same as `_parallel`, where both sums over the model axis can be taken together."""
    h_BTD = copy_to(block.norm_1(x_BTD), block.axis)
    return x_BTD + reduce_from(block.attention(h_BTD, sample_ids_B) + block.mlp(h_BTD), block.axis)


_STEPS = {"sequential": _sequential, "post": _post, "parallel": _parallel, "parallel_two_norms": _parallel}
