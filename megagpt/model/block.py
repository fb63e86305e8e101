"""One transformer block: norms, attention and MLP, and the residual stream that they are added to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.config.kernels import AUTO, Kernels
from megagpt.model.attention.attention import Attention
from megagpt.model.dropout import Dropout, block_site
from megagpt.model.lora import attach_adapters
from megagpt.model.mlp import MLPS
from megagpt.model.mlp.mlp import MLP
from megagpt.model.norm import Norm
from megagpt.model.stream import Stream
from megagpt.parallel.axis import Axis
from megagpt.parallel.linear import OPEN, SUMMED
from megagpt.parallel.parameter import Declared

if TYPE_CHECKING:
    from megagpt.config import ModelConfig
    from megagpt.config.lora import LoraConfig


class Block(nn.Module):
    """Attention and MLP as config.block and config.norm_position order them, with dropout on what each adds.

    Shapes: stream → stream, whose x_BTD has gone through; the rest travels along.
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
        declared: Declared,
        recompute: bool = False,
        kernels: Kernels = AUTO,
        lora: LoraConfig | None = None,
    ) -> None:
        super().__init__()
        self.recompute, self.axis = recompute, axis
        self.steps, edges = _STEPS["post" if config.norm_position == "post" else config.block], SUMMED
        if _is_one_sum(config):
            self.steps, edges = _parallel_in_one_sum, OPEN
        seed = declared.seed
        self.norm_1 = Norm(config, declared.at("norm_1"), kernels)
        self.attention = Attention(config, layer, axis, declared.at("attention"), kernels, edges)
        self.norm_2 = None if config.block == "parallel" else Norm(config, declared.at("norm_2"), kernels)
        self.mlp = MLP(config, axis, declared.at("mlp"), kernels, edges)
        self.dropout_1 = Dropout(config.dropout_residual, seed, block_site(layer, 1), kernels)
        self.dropout_2 = Dropout(config.dropout_residual, seed, block_site(layer, 2), kernels)
        if lora is not None and lora.rank is not None:
            attach_adapters(self, declared, layer, axis, lora, kernels)

    def forward(self, inputs: Stream | tuple[Tensor, ...]) -> Stream:
        stream = Stream.of(inputs)
        if self.recompute and self.training:
            # No random state to preserve: dropout masks are a function of the ids.
            x_BTD = checkpoint(self.steps, self, stream, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BTD = self.steps(self, stream)
        return stream._replace(x=x_BTD)


def _sequential(block: Block, stream: Stream) -> Tensor:
    """x + attention(norm_1(x)), then x + mlp(norm_2(x))."""
    assert block.norm_2 is not None
    x_BTD, ids_B = stream.x, stream.sample_ids_B
    h_BTD = block.norm_1(x_BTD)
    if block.dropout_1.active:
        x_BTD = block.attention(stream._replace(x=h_BTD), epilogue=block.dropout_1.join(x_BTD, ids_B))
        h_BTD = block.norm_2(x_BTD)
    else:
        h_BTD, x_BTD = block.norm_2(block.attention(stream._replace(x=h_BTD)), x_BTD)
    return block.mlp(h_BTD, block.dropout_2.join(x_BTD, ids_B), ids_B)


def _post(block: Block, stream: Stream) -> Tensor:
    """norm_1(x + attention(x)), then norm_2(x + mlp(x))."""
    assert block.norm_2 is not None
    x_BTD, ids_B = stream.x, stream.sample_ids_B
    if block.dropout_1.active:
        x_BTD = block.norm_1(block.attention(stream, epilogue=block.dropout_1.join(x_BTD, ids_B)))
        return block.norm_2(block.mlp(x_BTD, block.dropout_2.join(x_BTD, ids_B), ids_B))
    x_BTD, _ = block.norm_1(block.attention(stream), x_BTD)
    x_BTD, _ = block.norm_2(block.mlp(x_BTD, sample_ids_B=ids_B), x_BTD)
    return x_BTD


def _parallel(block: Block, stream: Stream) -> Tensor:
    """x + attention(norm_1(x)) + mlp(norm_1(x)), or with norm_2(x) for the MLP where there is one."""
    x_BTD, ids_B = stream.x, stream.sample_ids_B
    h_BTD = block.norm_1(x_BTD)
    g_BTD = h_BTD if block.norm_2 is None else block.norm_2(x_BTD)
    x_BTD = block.attention(stream._replace(x=h_BTD), epilogue=block.dropout_1.join(x_BTD, ids_B))
    return block.mlp(g_BTD, block.dropout_2.join(x_BTD, ids_B), ids_B)


def _is_one_sum(config: ModelConfig) -> bool:
    """Whether nothing stands between the sums of attention and MLP and the stream that they are added to."""
    plain = not (config.bias_attention or config.bias_mlp or config.dropout_residual)
    summed_inside = MLPS[config.mlp].is_product
    return plain and not summed_inside and config.block == "parallel" and config.norm_position == "pre"


def _parallel_in_one_sum(block: Block, stream: Stream) -> Tensor:
    """The same as `_parallel`, where both sums over the model axis can be taken together."""
    h_BTD = SUMMED.enter(block.norm_1(stream.x), block.axis)
    y_BTD = block.attention(stream._replace(x=h_BTD)) + block.mlp(h_BTD, sample_ids_B=stream.sample_ids_B)
    return stream.x + SUMMED.leave(y_BTD, block.axis)


_STEPS = {"sequential": _sequential, "post": _post, "parallel": _parallel, "parallel_two_norms": _parallel}
