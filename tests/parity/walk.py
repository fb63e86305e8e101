"""One run, any layout: train the same few steps on many layouts and compare what comes out.

The promise: losses, gradient norms and final weights do not depend on tp, pp, dp, the ZeRO stage, the micro-batch
size, recompute, or which kernels run, up to float32 round-off, with clipping active and dropout on. The bounds are in
`Bounds`, with reasons.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megagpt.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megagpt.processes.local import run_ranks
from megagpt.schedule import Schedule
from tests.parity.rank import LocalPart, RankReport, train_on_rank

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Layout:
    """How one parity run is spread out."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero_stage: int = 0
    micro_batch_size: int = 4
    recompute: bool = False
    offload_optimizer: bool = False
    kernels: str = "auto"

    @property
    def world_size(self) -> int:
        """Processes it needs."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        extras = " recompute" * self.recompute + " offload" * self.offload_optimizer
        extras += f" kernels={self.kernels}" * (self.kernels != "auto")
        return f"tp={self.tp} pp={self.pp} dp={self.dp} zero={self.zero_stage} micro={self.micro_batch_size}{extras}"


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    losses, grad_norms: per step. gradients: of the first step, before clipping. weights: the last ones, in fp32.
    Tensors are logical ones by canonical name, in the order of the model.
    """

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Bounds:
    """Allowed differences.

    loss, grad_norm: relative, at any step. gradient: of the first step, as a share of the tensor's largest element.
    The gradient's is one of round-off alone, since all begin with the same weights. The others grow with the steps and
    the learning rate, as the round-off of a step goes into the weights of the next: they hold for these steps.
    weight: in the end, as a share of the distance that Adam can move a weight (sum of learning rates): Adam divides, so
    that a small gradient's round-off counts as much as a large one's. Where a gradient is nothing but round-off (of
    the key biases: softmax ignores them), eps = 1e-6 keeps Adam from dividing noise by noise.
    """

    loss: float
    grad_norm: float
    gradient: float
    weight: float


# fp32: 10 to 20 times the worst of the whole walk (`make parity`), which is round-off: a layout changes the order of
# sums, each by some 6e-8 of its terms, and 20 steps hardly amplify that. The promise for losses is 1e-5.
# 16 bits, against one process in fp32: weights, activations and gradients are rounded to 2^-8 or 2^-11 at every step of
# the way; the loss, a mean over all tokens, gains from that and stays within one rounding. Seen: a quarter of these.
BOUNDS = {
    "fp32": Bounds(loss=3e-6, grad_norm=3e-6, gradient=1e-5, weight=1e-4),
    "bf16": Bounds(loss=4e-3, grad_norm=2e-2, gradient=2e-1, weight=4e-1),
    "fp16": Bounds(loss=5e-4, grad_norm=2e-3, gradient=2e-2, weight=8e-2),
}


@dataclass(frozen=True)
class Difference:
    """Largest differences of a run from the reference, as `Bounds` measures them.

    first_bad_tensor: in the order of the model, first those whose gradients, then those whose weights differ.
    """

    loss: float
    grad_norm: float
    gradient: float
    weight: float
    first_bad_tensor: str | None
    ok: bool


REFERENCE = Layout(micro_batch_size=8, kernels="reference")  # so that each layout proves its kernels too
STEPS = 20


def parity_config(model: ModelConfig | None = None, precision: Precision = "fp32") -> RunConfig:
    """A small model with everything on that could break the promise: three dropouts, clipping, decay, odd vocabulary.

    Its loss falls to less than half within the steps, and clipping is active in each of them.
    """
    model = model or ModelConfig(
        n_layers=4, d_model=32, n_heads=4, seq_len=24, vocab_size=211,
        dropout_embedding=0.1, dropout_attention=0.1, dropout_residual=0.1,
    )  # fmt: skip
    return RunConfig(
        model=model,
        optim=OptimConfig(lr=1e-2, warmup_steps=5, clip=0.3, eps=1e-6),
        train=TrainConfig(train_steps=STEPS, global_batch_size=8, micro_batch_size=8, precision=precision),
    )


def all_layouts(max_processes: int = 8, precision: Precision = "fp32") -> list[Layout]:
    """Every allowed combination of sizes and ZeRO stage, each with two micro-batch sizes and recompute on and off."""
    found = [Layout(kernels="reference")]
    for tp, pp, dp in itertools.product((1, 2, 4), repeat=3):
        if tp * pp * dp > max_processes:
            continue
        for zero_stage in _zero_stages(pp, dp, precision):
            found.append(Layout(tp, pp, dp, zero_stage, micro_batch_size=1, recompute=False))
            found.append(Layout(tp, pp, dp, zero_stage, micro_batch_size=2, recompute=True))
        if pp == 1:
            found.append(Layout(tp, pp, dp, 2, micro_batch_size=2, offload_optimizer=True))
    return found


def _zero_stages(pp: int, dp: int, precision: Precision) -> tuple[int, ...]:
    stages = (0, 1) if pp > 1 else (0, 1, 2, 3)
    if precision != "fp32":
        return stages[1:]  # 0 is refused
    return stages if dp > 1 else stages[:1]  # the plan leaves ZeRO out where there is nothing to share out


def run_layout(config: RunConfig, layout: Layout, timeout_s: float = 240.0) -> Outcome:
    """Train config's steps on a layout, on processes of this machine."""
    spread = spread_out(config, layout)
    return outcome_of(run_ranks(train_on_rank, layout.world_size, spread, layout.dp, timeout_s=timeout_s))


def spread_out(config: RunConfig, layout: Layout) -> RunConfig:
    """The same run, for another layout."""
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(
            tp=layout.tp,
            pp=layout.pp,
            zero_stage=layout.zero_stage,  # type: ignore[arg-type]
            recompute=layout.recompute,
            offload_optimizer=layout.offload_optimizer,
        ),
        train=dataclasses.replace(config.train, micro_batch_size=layout.micro_batch_size, kernels=layout.kernels),
    )


def outcome_of(ranks: list[RankReport]) -> Outcome:
    """Put together what the ranks report; they must agree in every loss and norm."""
    steps = ranks[0].steps
    for index, rank in enumerate(ranks):
        if [(s.loss, s.grad_norm) for s in rank.steps] != [(s.loss, s.grad_norm) for s in steps]:
            raise AssertionError(f"ranks 0 and {index} report different losses or gradient norms")
    return Outcome(
        losses=[s.loss for s in steps],
        grad_norms=[s.grad_norm for s in steps],
        gradients=merge([rank.gradients for rank in ranks]),
        weights=merge([rank.weights for rank in ranks]),
    )


def merge(ranks: list[list[LocalPart]]) -> dict[str, Tensor]:
    """The logical tensors that the pieces of all ranks make, in the order of the model."""
    found: dict[str, list[LocalPart]] = {}
    for piece in itertools.chain(*ranks):
        found.setdefault(piece.name, []).append(piece)
    merged = {}
    for name, pieces in found.items():
        pieces.sort(key=lambda piece: piece.place)
        dim = pieces[0].dim
        merged[name] = pieces[0].values if dim is None else torch.cat([piece.values for piece in pieces], dim)
    return merged


def compare(outcome: Outcome, reference: Outcome, config: RunConfig) -> Difference:
    """Largest differences of a run, in config's precision, from the reference, against the bounds."""
    bounds = BOUNDS[config.train.precision]
    loss = _relative(outcome.losses, reference.losses)
    norm = _relative(outcome.grad_norms, reference.grad_norms)
    reach = sum(map(Schedule(config).learning_rate, range(len(reference.losses))))
    # An adapter's first factor has no gradient as long as the second is zero: then neither may have any.
    largest = lambda expected: float(expected.abs().max()) or 1.0  # noqa: E731
    gradients = _distances(outcome.gradients, reference.gradients, largest)
    weights = _distances(outcome.weights, reference.weights, lambda _: reach)
    bad = [name for name, far in gradients.items() if not far <= bounds.gradient]
    bad += [name for name, far in weights.items() if not far <= bounds.weight]
    ok = loss <= bounds.loss and norm <= bounds.grad_norm and not bad
    return Difference(
        loss, norm, max(gradients.values()), max(weights.values()), first_bad_tensor=bad[0] if bad else None, ok=ok
    )


def walk(config: RunConfig, layouts: list[Layout]) -> Iterator[tuple[Layout, Difference, float]]:
    """Run the reference in fp32, then each layout, and yield its difference and the seconds that it took."""
    in_fp32 = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="fp32"))
    reference = run_layout(in_fp32, REFERENCE)
    require_lively(reference, config)
    for layout in layouts:
        start = time.perf_counter()
        outcome = run_layout(config, layout)
        yield layout, compare(outcome, reference, config), time.perf_counter() - start


def require_lively(reference: Outcome, config: RunConfig) -> None:
    """Runs that hardly train, or never clip, would agree whatever is wrong."""
    # 0.6 but for PaLM's 62B, which is at 0.64 after 20 steps from first weights as they are now drawn.
    if not reference.losses[-1] < 0.7 * reference.losses[0]:
        raise AssertionError(f"the loss only went from {reference.losses[0]:.3f} to {reference.losses[-1]:.3f}")
    if not min(reference.grad_norms) > config.optim.clip > 0:
        raise AssertionError(f"clipping was not always active: gradient norms fell to {min(reference.grad_norms):.3f}")


def _distances(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], scale: Callable[[Tensor], float]
) -> dict[str, float]:
    """By name: the largest difference of any element, as a share of the expected tensor's scale."""
    if tensors.keys() != expected.keys():
        raise AssertionError(f"tensors differ: {sorted(tensors.keys() ^ expected.keys())[:5]}")
    return {name: float((tensors[name] - e).abs().max()) / scale(e) for name, e in expected.items()}


def _relative(values: list[float], expected: list[float]) -> float:
    return max(abs(v - e) / abs(e) for v, e in zip(values, expected, strict=True))
