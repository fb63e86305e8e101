"""The gradient noise scale: about the largest batch that still pays, measured while training goes on.

The squared norm of a gradient over B tokens is |G|² + tr(Σ) / B in the mean: G the true gradient, Σ the covariance of a
token's. Two batch sizes give both. The large one is the step's batch, whose norm clipping needs anyway; the small one
is the first micro-batch of each data parallel rank, looked at while its gradient passes by on its way to the others.
Each of the two estimates is right in the mean at every step; their quotient is not, so that they are smoothed first.
What is measured depends on the micro-batch size and dp, what it tends to does not.

Source: McCandlish et al. 2018 (An Empirical Model of Large-Batch Training), section 2.2 and appendix A.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.checkpoint.state import NoiseState
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.parameter import Named
from megagpt.train.step.grad_norm import counts

DECAY = 0.99  # of the two means, a step


@dataclass(frozen=True)
class NoiseScale:
    """Moving averages of the two estimates. signal: of |G|². noise: of tr(Σ), for a token."""

    signal: float = 0.0
    noise: float = 0.0

    def after(self, small: float, big: float, small_tokens: int, big_tokens: int) -> NoiseScale:
        """With one more step: squared gradient norms of two batch sizes.

        The averages begin at 0 and are not corrected for it: their quotient needs no correction.
        """
        signal = (big_tokens * big - small_tokens * small) / (big_tokens - small_tokens)
        noise = (small - big) / (1 / small_tokens - 1 / big_tokens)
        return NoiseScale(
            DECAY * self.signal + (1 - DECAY) * signal,
            DECAY * self.noise + (1 - DECAY) * noise,
        )

    @property
    def tokens(self) -> float | None:
        """tr(Σ) / |G|², in tokens of a batch; None while the estimates make no sense (one of them below 0)."""
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else None


class NoiseMeter:
    """Measures the noise scale of a run; `scale` is where it stands."""

    def __init__(self, parameters: list[Named], mesh: Mesh, tied: list[tuple[Tensor, Any]]) -> None:
        """tied: weights that other pipeline stages have copies of, each with the group of those stages."""
        self.scale = NoiseScale()
        self._n_replicas = mesh.data.size
        self._squares: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}  # gradients of tied weights, of which other stages have the rest
        self._counted = {named.name for named in parameters if counts(named, mesh)}
        groups = {id(weight): group for weight, group in tied}
        self._groups = {n.name: groups[id(n.parameter)] for n in parameters if id(n.parameter) in groups}
        for named in parameters:
            look = self._keep if named.name in self._groups else self._add
            if look == self._keep or named.name in self._counted:
                named.parameter.register_hook(partial(look, named.name))

    def begin(self) -> None:
        """A step begins: the next gradient of each parameter is that of its first micro-batch."""
        self._squares.clear()
        self._copies.clear()

    def measure(self, grad_norm: float, gradient_scale: float, micro_tokens: int, batch_tokens: int) -> None:
        """A step is done. gradient_scale: what the loss of a micro-batch was multiplied with before its backward pass.

        Comm: an all-reduce of one number over all ranks, and of each tied weight's gradient over its stages.
        """
        for name, grad in self._copies.items():
            dist.all_reduce(grad, group=self._groups[name])
            if name in self._counted:
                self._squares[name] = grad.square().sum()
        total = torch.stack(list(self._squares.values())).sum()
        dist.all_reduce(total)
        if micro_tokens < batch_tokens:
            small = float(total) / self._n_replicas / gradient_scale**2
            self.scale = self.scale.after(small, grad_norm**2, micro_tokens, batch_tokens)

    @property
    def state(self) -> NoiseState:
        """What a checkpoint keeps of it."""
        return NoiseState(signal=self.scale.signal, noise=self.scale.noise)

    def go_on_from(self, state: NoiseState) -> None:
        """Take over what a checkpoint kept; one that kept nothing begins anew."""
        self.scale = NoiseScale(**state)

    def _add(self, name: str, grad: Tensor) -> None:
        if name not in self._squares:
            self._squares[name] = torch.linalg.vector_norm(grad, dtype=torch.float32).square()

    def _keep(self, name: str, grad: Tensor) -> None:
        if name not in self._copies:
            self._copies[name] = grad.float().clone()
