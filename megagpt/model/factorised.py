"""The two matrices of an MLP, dense or as products of fewer parameters (ModelConfig.mlp), shared out over an axis.

Shapes: I inputs, O outputs, _local a shard over the axis.
"""

from __future__ import annotations

from torch import nn

from megagpt.config import ModelConfig
from megagpt.inventory.factorised_sizes import check_mlp
from megagpt.model.factorised_butterfly import ButterflyColumn, ButterflyRow
from megagpt.model.factorised_low_rank import LowRankColumn, LowRankRow
from megagpt.model.factorised_monarch import MonarchColumn, MonarchRow
from megagpt.parallel.axis import Axis
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megagpt.parallel.parameter import NamedNormal


def up_matrix(config: ModelConfig, axis: Axis, draw: NamedNormal, *, partial: bool = False) -> nn.Module:
    """From the residual stream to this rank's part of the hidden width; with a gate, two of them side by side.

    Shapes, epilogue and bias are those of ColumnParallelLinear, whatever kind of matrix it is.
    partial: the block takes the sums over the axis, of attention and MLP at once; for dense matrices only.
    """
    _require_fits(config, axis, partial)
    D, F, packs, bias = config.d_model, config.ff_width, 2 if config.gated else 1, config.bias_mlp
    if config.mlp == "low_rank":
        assert config.mlp_rank is not None
        return LowRankColumn(D, F, config.mlp_rank, axis, draw, packs=packs, bias=bias)
    if config.mlp == "monarch":
        assert config.mlp_blocks is not None
        return MonarchColumn(D, F, config.mlp_blocks, axis, draw, packs=packs, bias=bias)
    if config.mlp == "butterfly":
        return ButterflyColumn(D, F, axis, draw, packs=packs, bias=bias)
    return ColumnParallelLinear(D, F, axis, draw, packs=packs, bias=bias, copied=partial)


def down_matrix(config: ModelConfig, axis: Axis, draw: NamedNormal, *, partial: bool = False) -> nn.Module:
    """Back to the residual stream. Shapes, epilogue, bias are those of RowParallelLinear; partial: see `up_matrix`."""
    _require_fits(config, axis, partial)
    D, F, bias = config.d_model, config.ff_width, config.bias_mlp
    if config.mlp == "low_rank":
        assert config.mlp_rank is not None
        return LowRankRow(F, D, config.mlp_rank, axis, draw, bias=bias)
    if config.mlp == "monarch":
        assert config.mlp_blocks is not None
        return MonarchRow(F, D, config.mlp_blocks, axis, draw, bias=bias)
    if config.mlp == "butterfly":
        return ButterflyRow(F, D, axis, draw, bias=bias)
    return RowParallelLinear(F, D, axis, draw, bias=bias, partial=partial)


def _require_fits(config: ModelConfig, axis: Axis, partial: bool) -> None:
    check_mlp(config, axis.size)  # evaluation and generation take as many ranks as they are given, without a plan
    if partial and config.mlp != "dense":
        raise ValueError(f"got partial sums of {config.mlp} matrices, which take sums in between; wanted dense ones")
