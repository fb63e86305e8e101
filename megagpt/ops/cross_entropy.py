"""Cross-entropy over logits of which a rank may hold only a part of the vocabulary, with label smoothing and z-loss.

With logits z over a vocabulary of V, lse = log Σ exp z and p = exp(z - lse):
  loss = (1-ε) (lse - z_label) + ε (lse - mean z) + ζ lse²
  d loss / d z_v = (1 + 2 ζ lse) p_v - (1-ε) [v = label] - ε/V
Kept between forward and backward: the logits and two numbers a token, never probabilities.
Shapes: N tokens, V columns of the logits, of which the first L are in use (`n_valid`) and the others padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagpt.ops.library import define, differentiable, require_same_device, runs_kernel


class Statistics(NamedTuple):
    """What a loss needs to know of a token's logits; (N) each, float32 (float64 for float64).

    The parts of a vocabulary merge: `top` by maximum, `total` by sum once it is relative to the common top, the others
    by sum. A part without columns has top = -inf and zeros.
    """

    top: Tensor
    """The largest logit."""
    total: Tensor
    """Σ exp(z - top)."""
    label_logit: Tensor
    """The label's logit; 0 where the label is not among the columns."""
    logit_sum: Tensor
    """Σ z."""

    def relative_to(self, top: Tensor) -> Statistics:
        """The same, with `total` relative to a top that is at least as large."""
        return self._replace(top=top, total=self.total * (self.top - top).exp())


class _Loss(NamedTuple):
    """Which columns are which, and which loss is taken."""

    first: int
    n_valid: int
    vocab: int
    label_smoothing: float
    z_loss: float


def cross_entropy(
    logits_NV: Tensor,
    labels_N: Tensor,
    *,
    n_valid: int | None = None,
    first: int = 0,
    vocab: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    plain_value: bool = False,
    combine: Callable[[Statistics], Statistics] | None = None,
    in_place: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """Negative log-likelihood of each label, in float32 (float64 for float64 logits).

    n_valid: columns in use (default: all); further ones are padding, of any content, and get gradient 0.
    first: the id that column 0 stands for.  vocab: size of the whole vocabulary (default: n_valid).
    plain_value: return the negative log-likelihood alone; the gradient is that of the whole loss all the same.
    combine: merges this rank's statistics with those of the ranks that hold the rest; None: there is no rest.
    in_place: the backward pass writes the gradient over the logits (a copy, where these have gaps) and runs only once.
    A label that no rank has counts as a label with logit 0.
    Shapes: logits_NV, labels_N int64 → loss_N.
    Source: Shoeybi et al. 2019, section 3; label smoothing: Szegedy et al. 2016, section 7; z-loss: Chowdhery et al.
    2022 (PaLM), section 5.
    Raises ValueError for shapes and settings that do not fit, RuntimeError for a second backward pass in place.
    """
    _check(logits_NV, labels_N, label_smoothing)
    n_columns = logits_NV.shape[1]
    n_valid = n_columns if n_valid is None else n_valid
    if not 0 <= n_valid <= n_columns:
        raise ValueError(f"cross_entropy: got n_valid={n_valid}, wanted 0 to {n_columns}, the columns of the logits")
    if vocab is None and combine is not None:
        raise ValueError("cross_entropy: got combine without vocab, wanted the size of the whole vocabulary")
    loss = _Loss(first, n_valid, n_valid if vocab is None else vocab, label_smoothing, z_loss)
    shown = loss._replace(label_smoothing=0.0, z_loss=0.0) if plain_value else loss
    kernel = runs_kernel("cross_entropy", logits_NV, kernels)
    logits_NV = logits_NV.contiguous() if in_place else logits_NV
    return _CrossEntropy.apply(logits_NV, labels_N, loss, shown, combine, in_place, kernel)  # type: ignore[return-value]


def _check(logits_NV: Tensor, labels_N: Tensor, label_smoothing: float) -> None:
    """Raise ValueError for what the kernels, which look at nothing but addresses, could not take."""
    if logits_NV.dim() != 2 or labels_N.shape != logits_NV.shape[:1]:
        got = f"logits {tuple(logits_NV.shape)} and labels {tuple(labels_N.shape)}"
        raise ValueError(f"cross_entropy: got {got}, wanted (N, V) and (N)")
    require_same_device("cross_entropy", logits_NV, labels=labels_N)
    if labels_N.dtype != torch.int64:
        raise ValueError(f"cross_entropy: got labels of {labels_N.dtype}, wanted torch.int64")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"cross_entropy: got label_smoothing={label_smoothing}, wanted 0 to 1")


SECOND_BACKWARD = (
    "cross_entropy: a second backward pass, but with in_place=True the first overwrote the logits; use in_place=False"
)


class _CrossEntropy(torch.autograd.Function):
    """Statistics forward, the gradient backward; the ranks' collectives sit between."""

    @staticmethod
    def forward(
        ctx, logits_NV: Tensor, labels_N: Tensor, loss: _Loss, shown: _Loss, combine, in_place: bool, kernel: bool
    ) -> Tensor:
        if kernel:
            op = torch.ops.megagpt.cross_entropy
            statistics = Statistics(*op(logits_NV, labels_N, loss.first, loss.n_valid))
        else:
            statistics = _statistics(logits_NV, labels_N, loss)
        if combine is not None:
            statistics = combine(statistics)
        ctx.save_for_backward(logits_NV, labels_N, statistics.top, statistics.total)
        ctx.loss, ctx.in_place, ctx.kernel, ctx.overwritten = loss, in_place, kernel, False
        return _loss(statistics, shown)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator's signature
        if ctx.overwritten:
            raise RuntimeError(SECOND_BACKWARD)
        logits_NV, labels_N, top_N, total_N = ctx.saved_tensors
        ctx.overwritten = ctx.in_place
        given = (labels_N, top_N, total_N, grads[0], *ctx.loss)
        if ctx.overwritten:
            d_logits_NV = logits_NV.detach()
            write = torch.ops.megagpt.cross_entropy_gradient_ if ctx.kernel else _write_gradient
            write(d_logits_NV, *given)
            torch.autograd.graph.increment_version(logits_NV)  # who else kept the logits for a gradient gets an error
        elif ctx.kernel:
            d_logits_NV = torch.ops.megagpt.cross_entropy_backward(logits_NV, *given)
        else:
            d_logits_NV = logits_NV.clone(memory_format=torch.contiguous_format)
            _write_gradient(d_logits_NV, *given)
        return d_logits_NV, None, None, None, None, None, None


def _loss(statistics: Statistics, loss: _Loss) -> Tensor:
    """Everything relative to the largest logit: no digits are lost where logits are large."""
    top_N, total_N, label_logit_N, logit_sum_N = statistics
    log_total_N = total_N.log()
    loss_N = log_total_N + (top_N - label_logit_N)
    if loss.label_smoothing:
        uniform_N = log_total_N + (top_N - logit_sum_N / loss.vocab)
        loss_N = (1 - loss.label_smoothing) * loss_N + loss.label_smoothing * uniform_N
    if loss.z_loss:
        loss_N = loss_N + loss.z_loss * (log_total_N + top_N).square()
    return loss_N


def _statistics(logits_NV: Tensor, labels_N: Tensor, loss: _Loss) -> Statistics:
    """The reference of the op of that name."""
    logits_NL = logits_NV[:, : loss.n_valid]
    wide = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    top_N = logits_NV.new_full(labels_N.shape, -torch.inf, dtype=wide)  # what a rank without columns has
    total_N, logit_sum_N, label_logit_N = (torch.zeros_like(top_N) for _ in range(3))
    for rows in _chunks(logits_NL):
        top_N[rows] = logits_NL[rows].amax(-1).to(wide)
        shift_N = top_N[rows].masked_fill(top_N[rows] == -torch.inf, 0.0)  # -inf - -inf would be NaN
        total_N[rows] = torch.sub(logits_NL[rows], shift_N[:, None]).exp_().sum(-1)
        logit_sum_N[rows] = logits_NL[rows].sum(-1, dtype=wide)
    if loss.n_valid:
        here_N, column_N = _columns(labels_N, loss.first, loss.n_valid)
        label_logit_N = logits_NL.gather(1, column_N[:, None]).squeeze(1).to(wide).masked_fill(~here_N, 0.0)
    return Statistics(top_N, total_N, label_logit_N, logit_sum_N)


def _write_gradient(
    logits_NV: Tensor, labels_N: Tensor, top_N: Tensor, total_N: Tensor, grad_N: Tensor, *loss: float
) -> None:
    """The reference of cross_entropy_gradient_."""
    first, n_valid, vocab, label_smoothing, z_loss = _Loss(*loss)  # type: ignore[arg-type]
    logits_NV[:, n_valid:] = 0
    logits_NL = logits_NV[:, :n_valid]
    here_N, column_N = _columns(labels_N, first, n_valid)
    scale_N = grad_N * (1 + 2 * z_loss * (top_N + total_N.log())) / total_N
    d_label_N = (-(1 - label_smoothing) * grad_N).masked_fill(~here_N, 0.0)
    for rows in _chunks(logits_NL):
        d_NL = torch.sub(logits_NL[rows], top_N[rows, None]).exp_().mul_(scale_N[rows, None])
        if label_smoothing:
            d_NL -= grad_N[rows, None] * (label_smoothing / vocab)
        logits_NL[rows] = d_NL.scatter_add_(1, column_N[rows, None], d_label_N[rows, None])


def _columns(labels_N: Tensor, first: int, n_valid: int) -> tuple[Tensor, Tensor]:
    """Which labels are among the columns, and their columns (0 for the others)."""
    column_N = labels_N - first
    here_N = (column_N >= 0) & (column_N < n_valid)
    return here_N, column_N.masked_fill(~here_N, 0)


def _chunks(logits_NL: Tensor) -> Iterator[slice]:
    """Ranges of rows, none where L = 0: small enough for a CPU's caches, large enough to keep a GPU busy."""
    n_rows, width = logits_NL.shape
    if width:
        step = max(1, (2**24 if logits_NL.is_cuda else 2**20) // width)
        for begin in range(0, n_rows, step):
            yield slice(begin, begin + step)


def _fake_statistics(logits: Tensor, labels: Tensor, *_: float) -> tuple[Tensor, ...]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(labels.shape, dtype=wide) for _ in range(4))


def _save_nothing(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx, *grads: Tensor) -> tuple:
    return None, None, None, None


_LOSS = "int first, int n_valid, int vocab, float label_smoothing, float z_loss"
_GIVEN = f"Tensor labels, Tensor top, Tensor total, Tensor grad, {_LOSS}"
_STATISTICS = "(Tensor top, Tensor total, Tensor label_logit, Tensor logit_sum)"
define(
    f"cross_entropy(Tensor logits, Tensor labels, int first, int n_valid) -> {_STATISTICS}",
    _fake_statistics,
)
define(f"cross_entropy_backward(Tensor logits, {_GIVEN}) -> Tensor", lambda x, *_: x.new_empty(x.shape))
define(f"cross_entropy_gradient_(Tensor(a!) logits, {_GIVEN}) -> ()", lambda *_: None)
differentiable("cross_entropy", _save_nothing, _no_gradient)
