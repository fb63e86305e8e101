"""What the matrices of an MLP hold and compute, dense or as products of fewer parameters. Biases are not counted.

low_rank   W = S R, R (r, I), S (O, r): r (I + O) parameters.
monarch    a b x b grid of blocks (O/b x I/b), each of rank q = ceil(min(I, O) / b²): b q (I + O) parameters.
butterfly  c stacked butterflies of size n = 2^m, m levels of n/2 2x2 matrices each: 2 c n m parameters. The levels are
           multiplied into the two factors of a grid once a step, and tokens go through these.
How they are built: megagpt/model/factorised.py. Letters: I inputs, O outputs, t tensor parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megagpt.config import ModelConfig, divisors, require

Kind = Literal["dense", "low_rank", "butterfly", "monarch"]
Parallel = Literal["column", "row"]


def mlp_matrix_params(
    kind: Kind, n_inputs: int, n_outputs: int, rank: int | None, blocks: int | None, tp: int, parallel: Parallel
) -> tuple[int, int]:
    """(logical, held by one rank of the model axis): of one matrix of the MLP.

    column: outputs are shared out over the axis (up); row: inputs are (down).
    """
    if kind == "low_rank":
        assert rank is not None
        whole, shared = (n_inputs, n_outputs) if parallel == "column" else (n_outputs, n_inputs)
        return rank * (n_inputs + n_outputs), rank * (whole + shared // tp)
    if kind == "monarch":
        assert blocks is not None
        params = monarch_grid(n_inputs, n_outputs, blocks).params
        return params, params // tp
    if kind == "butterfly":
        params = _butterfly(n_inputs, n_outputs, parallel).params
        return params, params  # few enough for every rank to hold them all
    return n_inputs * n_outputs, n_inputs * n_outputs // tp


def mlp_matrix_flops(
    kind: Kind, n_inputs: int, n_outputs: int, rank: int | None, blocks: int | None, parallel: Parallel
) -> int:
    """FLOPs of a token through one matrix, forward: 2 for each number of the factors that it is multiplied with."""
    if kind == "low_rank":
        assert rank is not None
        return 2 * rank * (n_inputs + n_outputs)
    if kind == "monarch":
        assert blocks is not None
        return 2 * monarch_grid(n_inputs, n_outputs, blocks).params
    if kind == "butterfly":
        return 2 * _butterfly(n_inputs, n_outputs, parallel).grid_numbers
    return 2 * n_inputs * n_outputs


def mlp_kept_width(model: ModelConfig, tp: int) -> int:
    """Numbers of a token that the backward pass of a block's MLP keeps beside those of a dense one, on one rank.

    Those between the factors; and the copies that are made where widths do not fill a butterfly evenly.
    """
    D, F = model.d_model, model.ff_width
    n_matrices = 3 if model.gated else 2
    if model.mlp == "low_rank":
        assert model.mlp_rank is not None
        return n_matrices * model.mlp_rank
    if model.mlp == "monarch":
        assert model.mlp_blocks is not None
        return n_matrices * monarch_grid(D, F, model.mlp_blocks).middle // tp
    if model.mlp == "butterfly":
        shape = Butterfly(D, F)
        slots, padded = shape.stacks * shape.high * shape.kept_hidden, shape.kept_residual * shape.high
        copies = (slots if slots != F else 0) // tp + (padded if padded != D else 0)
        return n_matrices * shape.middle // tp + copies
    return 0


def check_mlp(model: ModelConfig, tp: int) -> None:
    """Whether tp can share out a factorised MLP.  Raises UserError."""
    if model.mlp != "dense":
        choices = ", ".join(map(str, divisors(model.ff_width)))
        require(model.ff_width % tp == 0, f"parallel.tp={tp}", f"must divide d_ff={model.ff_width}", f"try {choices}")
    if model.mlp == "monarch":
        assert model.mlp_blocks is not None
        choices = ", ".join(map(str, divisors(model.mlp_blocks)))
        got = f"parallel.tp={tp}"
        require(model.mlp_blocks % tp == 0, got, f"must divide mlp_blocks={model.mlp_blocks}", f"try {choices}")
    if model.mlp == "butterfly":
        most = Butterfly(model.d_model, model.ff_width).high
        choices = ", ".join(map(str, divisors(most)))
        got = f"parallel.tp={tp} with model.mlp=butterfly of d_model={model.d_model}"
        require(most % tp == 0, got, f"must be a power of two, at most {most}", f"try {choices}")


@dataclass(frozen=True)
class Grid:
    """A matrix as a grid of blocks: n_down rows of n_across blocks, each `height` x `width` and of rank `rank`."""

    n_down: int
    n_across: int
    height: int
    width: int
    rank: int

    @property
    def middle(self) -> int:
        """Numbers between the two factors."""
        return self.n_down * self.n_across * self.rank

    @property
    def params(self) -> int:
        """Of a block's two factors (rank, width) and (height, rank), for all blocks."""
        return self.middle * (self.height + self.width)


def monarch_grid(n_inputs: int, n_outputs: int, blocks: int) -> Grid:
    """The middle is as wide as the narrower side, rounded up to a multiple of blocks²."""
    rank = -(-min(n_inputs, n_outputs) // blocks**2)
    return Grid(blocks, blocks, n_outputs // blocks, n_inputs // blocks, rank)


@dataclass(frozen=True)
class Butterfly:
    """A butterfly between the residual stream (its size rounded up to n = 2^m) and the hidden width (c times n).

    An index of the n consists of m bits. The upper half of the levels mixes the high bits, which count to `high`, the
    lower half the low bits, which count to `low`: so that each half is one factor of a grid of rank 1.
    """

    n_residual: int
    n_hidden: int

    @property
    def levels(self) -> int:
        """m, 2 or more: n = 2^m is the first power of two that the residual stream fits in."""
        return max(2, (self.n_residual - 1).bit_length())

    @property
    def size(self) -> int:
        """n."""
        return 1 << self.levels

    @property
    def stacks(self) -> int:
        """c, butterflies side by side."""
        return -(-self.n_hidden // self.size)

    @property
    def high(self) -> int:
        """What the high bits count to; tensor parallelism shares these out."""
        return 1 << (self.levels + 1) // 2

    @property
    def low(self) -> int:
        """What the low bits count to."""
        return self.size // self.high

    @property
    def kept_residual(self) -> int:
        """Low indices in use: the residual stream fills n by groups of `high`."""
        return -(-self.n_residual // self.high)

    @property
    def kept_hidden(self) -> int:
        """Low indices in use on the hidden side, in each of `stacks * high` groups."""
        return -(-self.n_hidden // (self.stacks * self.high))

    @property
    def params(self) -> int:
        """2x2 matrices: m levels of n/2, times c."""
        return 2 * self.stacks * self.size * self.levels

    @property
    def middle(self) -> int:
        """Numbers between the two factors that the levels are multiplied into."""
        return self.stacks * self.high * self.kept_residual

    @property
    def grid_numbers(self) -> int:
        """Numbers of these two factors, as far as they are used."""
        return self.middle * (self.high + self.kept_hidden)


def _butterfly(n_inputs: int, n_outputs: int, parallel: Parallel) -> Butterfly:
    return Butterfly(n_inputs, n_outputs) if parallel == "column" else Butterfly(n_outputs, n_inputs)
