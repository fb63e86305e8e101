"""Each optimizer's step: against torch's own, and where torch has none against its paper in plain float64.

One process, no engine: weights, and gradients out of the air, of a model whose heads share keys and whose MLP has a
gate, so that the rows of its matrices mean several things. `test_optimizer_layouts.py` spreads them out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megagpt.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from megagpt.errors import UserError
from megagpt.inventory.layers import layers
from megagpt.model.gpt import GPT
from megagpt.optim import OPTIMIZERS
from megagpt.optim.adam import AdamW
from megagpt.optim.build import build_optimizer, set_rate
from megagpt.optim.mesh_optimizer import MeshOptimizer
from megagpt.optim.muon import Muon, maps_of, orthogonal, weight_of
from megagpt.optim.rules import kept_by_optimizer, rule_of
from megagpt.optim.segments import Segment, Segments
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.mesh import single_process_mesh
from megagpt.parallel.parameter import Named, named_parameters
from megagpt.train.step.masters import Masters

MODEL = ModelConfig(
    n_layers=2, d_model=24, d_head=5, n_heads=4, n_kv_heads=2, seq_len=8, vocab_size=50, activation="swiglu", d_ff=40
)
RATES = [1e-2, 2e-2, 3e-2, 2e-2, 1e-2]  # of each step: warm-up and decay
DECAY = 0.1

Rates = Callable[[float], None]


def parameters_of(model: ModelConfig = MODEL) -> list[Named]:
    torch.manual_seed(1)
    return named_parameters(GPT(model, SINGLE))


def gradient_of(named: Named, step: int) -> Tensor:
    """Of another size for each parameter and step; the token matrix has rows without any, as text has it."""
    generator = torch.Generator().manual_seed(hash((step, tuple(named.part.shape))) % 2**31)
    gradient = torch.randn(named.part.shape, generator=generator) * 10.0 ** (step - 2)
    if named.name == "embedding.tokens.weight":
        gradient[step : 3 * step] = 0
    return gradient


def started(named: list[Named], config: OptimConfig, precision: str = "fp32") -> torch.optim.Optimizer:
    """The optimizer before its first step, with all that it keeps."""
    run = RunConfig(model=MODEL, optim=config, train=TrainConfig(precision=precision))  # type: ignore[arg-type]
    optimizer, _ = build_optimizer(named, run)
    Masters(SimpleNamespace(parameters=named, segments=segments_of(named), optimizer=optimizer), config)  # type: ignore[arg-type]
    return optimizer


def train(named: list[Named], config: OptimConfig, precision: str = "fp32") -> list[dict[str, Tensor]]:
    """The weights after each step."""
    optimizer = started(named, config, precision)
    weights = []
    for step, rate in enumerate(RATES):
        set_rate(optimizer, rate, config)
        for n in named:
            n.parameter.grad = torch.zeros_like(n.parameter)  # of the padding it stays zero
            n.part.unpadded(n.parameter.grad).copy_(gradient_of(n, step))
        optimizer.step()
        weights.append({n.name: weight_in(n).clone() for n in named})
    return weights


def segments_of(named: list[Named]) -> Segments:
    return Segments.listed(map(Segment.whole, named), SINGLE, single_process_mesh(), torch.device("cpu"))


def weight_in(named: Named) -> Tensor:
    return named.part.unpadded(named.parameter.detach())


def decays(named: Named) -> bool:
    return named.parameter.dim() >= 2 and not named.name.endswith("bias")


def theirs(named: list[Named], make: Callable[[list[Tensor], float], torch.optim.Optimizer]) -> list[dict[str, Tensor]]:
    """The weights after each step of an optimizer of torch's, made for those that decay and those that do not.

    A gate's bias goes as a vector: its two halves are no rows of a matrix.
    """
    as_it_goes = lambda n, value: (value if decays(n) else value.flatten()).clone()  # noqa: E731
    copies = {n.name: as_it_goes(n, weight_in(n)).requires_grad_() for n in named}
    optimizers = [
        make([copies[n.name] for n in named if decays(n) == which], DECAY if which else 0.0) for which in (True, False)
    ]
    weights = []
    for step, rate in enumerate(RATES):
        for n in named:
            copies[n.name].grad = as_it_goes(n, gradient_of(n, step))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        weights.append({n.name: copies[n.name].detach().clone().view(n.part.shape) for n in named})
    return weights


def assert_close(ours: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], share: float = 1e-5) -> None:
    """Weights after every step, to a share of how far the largest has moved since the start."""
    for step, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            apart = (a[name].double() - b[name].double()).abs().max()
            assert apart <= share * sum(RATES[: step + 1]), (step, name, float(apart))


ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "fused": False, "foreach": False}


def test_adam_and_adamw_are_torch():
    named = parameters_of()
    expected = theirs(named, lambda p, decay: torch.optim.Adam(p, weight_decay=decay, **ADAM))
    assert_close(train(named, OptimConfig(optimizer="adam")), expected)
    named = parameters_of()
    expected = theirs(named, lambda p, decay: torch.optim.AdamW(p, weight_decay=decay, **ADAM))
    assert_close(train(named, OptimConfig(optimizer="adamw")), expected)


def test_factored_adafactor_is_torch():
    """Where the schedule stays below the 1 / sqrt(step) that torch's caps it by."""
    named = parameters_of()
    expected = theirs(named, lambda p, decay: torch.optim.Adafactor(p, weight_decay=decay, foreach=False))
    assert_close(train(named, OptimConfig(optimizer="adafactor")), expected)


def plain_palm(named: list[Named], config: OptimConfig) -> list[dict[str, Tensor]]:
    """Adafactor without factoring, in float64: Shazeer & Stern 2018, algorithm 2 with sections 6 to 8; PaLM, section 5.

    v is the second moment with a decay that grows; the step is clipped to a root mean square of 1 and scaled by that of
    the weights (at least 1e-3); momentum averages steps.
    """
    w = {n.name: weight_in(n).double() for n in named}
    v, m = ({name: torch.zeros_like(x) for name, x in w.items()} for _ in range(2))
    weights = []
    for k, rate in enumerate(RATES, start=1):
        for n in named:
            x, g = w[n.name], gradient_of(n, k - 1).double()
            beta2 = 1 - k**-0.8
            v[n.name] = beta2 * v[n.name] + (1 - beta2) * g**2
            u = g / v[n.name].sqrt().clamp(min=1e-8)
            u = u / max(1.0, u.square().mean().sqrt())
            u = u * rate * max(1e-3, x.square().mean().sqrt())
            m[n.name] = 0.9 * m[n.name] + 0.1 * u
            shrink = config.weight_decay * (rate**2 if config.weight_decay_times == "lr_squared" else rate)
            w[n.name] = x - (shrink * x if decays(n) else 0) - m[n.name]
        weights.append(dict(w))
    return weights


@pytest.mark.parametrize("times", ["lr", "lr_squared"])
def test_unfactored_adafactor_is_palm(times):
    named = parameters_of()
    config = OptimConfig(optimizer="adafactor_unfactored", weight_decay=1.0, weight_decay_times=times)
    expected = plain_palm(named, config)
    assert_close(train(named, config), expected)


def plain_lion(named: list[Named]) -> list[dict[str, Tensor]]:
    """Chen et al. 2023, program 1, in float64."""
    w = {n.name: weight_in(n).double() for n in named}
    m = {name: torch.zeros_like(x) for name, x in w.items()}
    weights = []
    for step, rate in enumerate(RATES):
        for n in named:
            x, g = w[n.name], gradient_of(n, step).double()
            update = torch.sign(0.9 * m[n.name] + 0.1 * g) + (DECAY * x if decays(n) else 0)
            m[n.name] = 0.95 * m[n.name] + 0.05 * g
            w[n.name] = x - rate * update
        weights.append(dict(w))
    return weights


def test_lion_is_its_paper():
    named = parameters_of()
    expected = plain_lion(named)
    assert_close(train(named, OptimConfig(optimizer="lion")), expected)


def maps_in(named: Named) -> list[tuple[slice, ...]] | None:
    """The linear maps of a block's matrix as index expressions, written out by hand; None where there are none."""
    K, n_kv = MODEL.head_width, MODEL.kv_heads
    if not named.name.startswith("blocks.") or not decays(named):
        return None
    if named.name.endswith("attention.kv.weight"):
        return [(torch.cat([torch.arange(K) + (2 * head + which) * K for head in range(n_kv)]),) for which in (0, 1)]  # type: ignore[return-value]
    if named.name.endswith("mlp.up.weight"):
        return [(0,), (1,)]  # type: ignore[return-value]
    return [(slice(None),)]


def test_muon_is_torch_on_each_linear_map_and_adamw_on_the_rest():
    """In the bfloat16 that torch iterates in, which the last bits of a product sway: to 2 % of a step."""
    named = parameters_of()
    assert "blocks.0.attention.kv.weight" in [n.name for n in named]
    start = {n.name: weight_in(n).clone() for n in named}
    ours = train(named, OptimConfig(optimizer="muon", beta1=0.95), precision="bf16")
    for n in named:
        places, weight = maps_in(n), start[n.name]
        settings = {"betas": (0.95, 0.95), "eps": 1e-8, "weight_decay": DECAY if decays(n) else 0.0}
        rest = weight.clone().requires_grad_()
        copies = [weight[place].clone().requires_grad_() for place in places or []]
        optimizer = torch.optim.AdamW([rest], **settings)
        if places:
            optimizer = torch.optim.Muon(copies, momentum=0.95, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
        for step, rate in enumerate(RATES):
            optimizer.param_groups[0]["lr"] = rate
            rest.grad = gradient_of(n, step)
            for copy, place in zip(copies, places or [], strict=True):
                copy.grad = rest.grad[place].clone()
            optimizer.step()
            for copy, place in zip(copies, places or [], strict=True):
                weight[place] = copy.detach()
            expected = weight if places else rest.detach()
            assert_close([{n.name: ours[step][n.name]}], [{n.name: expected}], 2e-2 if places else 1e-5)


def test_muon_makes_the_singular_values_alike_and_keeps_their_directions():
    """In float32: what is left of the singular values is Jordan's 0.7 to 1.2, also where columns are long."""
    torch.manual_seed(3)
    for shape in ((2, 8, 20), (2, 20, 8), (1, 16, 16)):
        matrices = torch.randn(shape)
        u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
        step = orthogonal(matrices, torch.float32).double() / (0.2 * math.sqrt(max(shape[1:])))
        left = u.mT @ step @ vh.mT
        values = torch.diagonal(left, dim1=-2, dim2=-1)
        assert (left - torch.diag_embed(values)).abs().max() < 1e-4
        large = s > 0.02 * s.norm(dim=-1, keepdim=True)
        assert values[large].min() > 0.6 and values.max() < 1.25


def test_rows_by_head_are_sorted_by_map_and_back():
    H, K, D = 3, 2, 5
    full = torch.arange(3 * H * K * D).view(3 * H * K, D)
    maps = maps_of(full, H, 3)
    for head in range(H):
        for which in range(3):
            rows = full[(3 * head + which) * K :][:K]
            assert torch.equal(maps[which, head * K : (head + 1) * K], rows)
    assert torch.equal(weight_of(maps, H, tuple(full.shape)), full)


@pytest.mark.parametrize(("position", "no_map"), [("t5", "attention.buckets.weight"), ("transformer_xl", "no such")])
def test_muon_is_for_linear_maps_alone(position, no_map):
    """Not for embeddings, the head, gains, biases (some have two dims), and tables."""
    named = parameters_of(dataclasses.replace(MODEL, position=position, n_kv_heads=None, tied_embeddings=False))
    config = OptimConfig(optimizer="muon")
    by_update = {
        kind: {n.name for n in named if type(rule_of(n.declared, config).update) is kind} for kind in (Muon, AdamW)
    }
    maps = {
        n.name for n in named if n.name.startswith("blocks.") and n.name.endswith(".weight") and "norm" not in n.name
    }
    assert by_update[Muon] == {name for name in maps if not name.endswith(no_map)}
    assert by_update[AdamW] == {n.name for n in named} - by_update[Muon]
    for n in named:
        is_table = n.name in ("embedding.tokens.weight", "head.tokens.weight") or n.name.endswith(no_map)
        assert rule_of(n.declared, config).decays == (n.name in by_update[Muon] or is_table), n.name


def test_a_step_without_gradients_moves_nothing():
    """As stage 0 of ZeRO skips a step that is not finite."""
    for name in ("lion", "adafactor", "adafactor_unfactored", "muon"):
        named = parameters_of()
        optimizer, _ = build_optimizer(named, RunConfig(model=MODEL, optim=OptimConfig(optimizer=name)))
        assert isinstance(optimizer, MeshOptimizer)
        optimizer.bind(segments_of(named))
        before = [n.parameter.detach().clone() for n in named]
        optimizer.step()
        assert all(torch.equal(a, n.parameter) for a, n in zip(before, named, strict=True))
        assert not optimizer.state


def test_decay_by_the_squared_rate_needs_decoupled_decay():
    with pytest.raises(UserError, match=r"optim\.weight_decay_times=lr_squared with optim\.optimizer=adam") as caught:
        OptimConfig(optimizer="adam", weight_decay_times="lr_squared")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_plan_counts_what_is_kept(name, ema_decay):
    """Layer by layer and number by number, against what is allocated before the first step."""
    config = OptimConfig(optimizer=name, ema_decay=ema_decay)
    named = parameters_of()
    optimizer = started(named, config)
    for n in named:
        allocated = [t for key, t in optimizer.state[n.parameter].items() if key != "step"]
        assert all(t.dtype == torch.float32 and t.shape == n.parameter.shape for t in allocated)
        assert kept_by_optimizer(n.declared, config) == len(allocated), n.name
    # The plan adds up the layers; and leaves out the means over rows and columns, which are few.
    planned = sum(
        kept_by_optimizer(p, config) * p.local_size(tp=1) for layer in layers(MODEL) for p in layer.parameters.values()
    )
    states = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    assert planned == sum(t.numel() for t in states)
    statistics = [t for kept in getattr(optimizer, "statistics", {}).values() for t in kept.values()]
    assert sum(t.numel() for t in statistics) < 0.2 * sum(n.parameter.numel() for n in named)
