"""Each kind of MLP matrices against the matrices written out, on one process and over the model axis."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megagpt.config import ModelConfig
from megagpt.errors import UserError
from megagpt.inventory.parameter import Parameters, kept_numbers
from megagpt.model.mlp import MLPS
from megagpt.model.mlp.kind import Direction, truncated
from megagpt.model.mlp.mlp import mlp_matrix
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.linear import OPEN
from megagpt.parallel.mesh import build_mesh
from megagpt.parallel.parameter import Declared
from megagpt.processes.local import run_ranks
from tests.logical import Parts, assemble, gradient_parts
from tests.model.mlp.plain_factorised import butterfly_dense, monarch_dense
from tests.parity.walk import REFERENCE, Layout, compare, parity_config, require_lively, run_layout
from tests.tolerances import assert_close, assert_equal

# d_model is no power of two; d_ff fills neither whole butterflies nor, with 40, whole groups of their units.
BASE = ModelConfig(n_layers=1, d_model=12, n_heads=4, d_ff=48, seq_len=8, vocab_size=32, init="normal", init_std=0.5)
CASES = {
    "dense": BASE,
    "low_rank": replace(BASE, mlp="low_rank", mlp_rank=5),
    "low_rank, gated": replace(BASE, mlp="low_rank", mlp_rank=5, activation="swiglu"),
    "monarch": replace(BASE, mlp="monarch", mlp_blocks=4),
    "monarch, gated": replace(BASE, mlp="monarch", mlp_blocks=4, activation="swiglu", bias_mlp=False),
    "monarch of rank 3": replace(BASE, mlp="monarch", mlp_blocks=2),
    "butterfly": replace(BASE, mlp="butterfly"),
    "butterfly, uneven": replace(BASE, mlp="butterfly", d_model=20, d_ff=40),
    "butterfly, gated, uneven": replace(BASE, mlp="butterfly", d_ff=40, activation="swiglu", bias_mlp=False),
}


def dense_of(kind: str, parameters: dict[str, Tensor], config: ModelConfig, direction: str) -> Tensor:
    """The logical matrix (O, I), packs below each other; parameters: the logical ones."""
    if kind == "dense":
        weight = parameters["weight"]
        return weight.reshape(-1, weight.shape[-1])
    packs = config.gated and direction == "up"
    one_by_one = [{n: p[i] for n, p in parameters.items()} for i in range(2)] if packs else [parameters]
    return torch.cat([_one_dense(kind, one, config, direction) for one in one_by_one])


def _one_dense(kind: str, parameters: dict[str, Tensor], config: ModelConfig, direction: str) -> Tensor:
    if kind == "low_rank":
        return parameters["second"] @ parameters["first"]
    if kind == "monarch":
        return monarch_dense(parameters["first"], parameters["second"])
    up = butterfly_dense(parameters["twiddle"], config.d_model, config.ff_width)
    return up if direction == "up" else up.T


def declared_by(config: ModelConfig, direction: Direction) -> Parameters:
    kind = MLPS[config.mlp](config)
    return kind.up() if direction == "up" else kind.down()


def made(config: ModelConfig, direction: Direction, axis: Axis, seed: int = 3) -> nn.Module:
    return mlp_matrix(direction, config, axis, Declared(direction, declared_by(config, direction), seed))


def built(config: ModelConfig, direction: Direction, axis: Axis) -> nn.Module:
    layer = made(config, direction, axis).double()
    if getattr(layer, "bias", None) is not None:
        nn.init.constant_(layer.bias, 0.3)  # pyright: ignore[reportArgumentType]
    return layer


def run_layers(x: dict[str, Tensor], dy: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Parts]]:
    """On each rank, for every case: output, input gradient and parameter gradients."""
    axis = build_mesh("cpu", pp=1, dp=1, tp=torch.distributed.get_world_size()).model
    return {key: run_layer(key, x[key], dy[key], axis) for key in x}


def run_layer(key: str, x: Tensor, dy: Tensor, axis: Axis) -> tuple[Tensor, Tensor, Parts]:
    name, direction = key.split("/")
    config = CASES[name]
    layer = built(config, direction, axis)
    if direction == "up":
        dy = torch.cat([pack.chunk(axis.size, -1)[axis.rank] for pack in dy.chunk(1 + config.gated, -1)], -1)
    else:
        x = x.chunk(axis.size, -1)[axis.rank]
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad, gradient_parts(layer.named_parameters())


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]]:
    """By case: x, dy, and what the matrix written out gives: y, input gradient, gradients of the parameters."""
    found = {}
    for name, config in CASES.items():
        for direction in ("up", "down"):
            widths = [config.d_model, config.ff_width * (1 + (config.gated and direction == "up"))]
            n_inputs, n_outputs = widths if direction == "up" else (config.ff_width, config.d_model)
            x, dy = (torch.randn(3, 5, n, dtype=torch.float64) for n in (n_inputs, n_outputs))
            layer = built(config, direction, SINGLE)
            parameters = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
            x_plain = x.clone().requires_grad_()
            y = x_plain @ dense_of(config.mlp, parameters, config, direction).T
            if "bias" in parameters:
                y = y + parameters["bias"].flatten()
            y.backward(dy)
            gradients = {n: p.grad for n, p in parameters.items()}
            found[f"{name}/{direction}"] = (x, dy, y.detach(), x_plain.grad, gradients)
    return found


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_matrices_equal_dense_ones_whatever_tp_is(expected, tp):
    """Outputs and every gradient in float64; replicated factors' gradients bitwise equal on all ranks."""
    allowed = [key for key in expected if CASES[key.split("/")[0]].mlp_blocks != 2 or tp <= 2]
    x, dy = ({key: expected[key][i] for key in allowed} for i in (0, 1))
    ranks = run_ranks(run_layers, tp, x, dy)
    for key in allowed:
        _, _, y_plain, x_grad_plain, gradients = expected[key]
        outputs, x_grads, parts = zip(*(rank[key] for rank in ranks), strict=True)
        if key.endswith("/up"):
            packs = 1 + CASES[key.split("/")[0]].gated
            y = torch.cat([torch.cat([o.chunk(packs, -1)[p] for o in outputs], -1) for p in range(packs)], -1)
            x_grad, same = x_grads[0], x_grads
        else:
            y, x_grad, same = outputs[0], torch.cat(x_grads, -1), outputs
        for other in same:
            assert_equal(other, same[0], f"{key}: ranks")
        assert_close(y, y_plain, f"{key}: output")
        assert_close(x_grad, x_grad_plain, f"{key}: input gradient")
        whole = assemble(parts)
        assert whole.keys() == gradients.keys()
        for n, gradient in whole.items():
            assert_close(gradient, gradients[n], f"{key}: gradient of {n}")


def numbers_of(config: ModelConfig, direction: Direction) -> int:
    """Of one pack, by the papers."""
    D, F = config.d_model, config.ff_width
    if config.mlp == "low_rank":
        return config.mlp_rank * (D + F)
    if config.mlp == "monarch":
        return config.mlp_blocks * math.ceil(D / config.mlp_blocks**2) * (D + F)
    if config.mlp == "butterfly":  # 2 n log2(n) each: 2 numbers for every output of a level
        levels = math.ceil(math.log2(D))
        return 2 * 2**levels * levels * math.ceil(F / 2**levels)
    return D * F


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("direction", ["up", "down"])
def test_numbers_are_those_of_the_papers_and_flops_those_that_torch_counts(name, direction):
    config = CASES[name]
    matrices = [p for p in declared_by(config, direction).values() if p.kind != "vector"]
    packs = 2 if config.gated and direction == "up" else 1
    assert sum(p.size for p in matrices) == packs * numbers_of(config, direction)
    layer = built(config, direction, SINGLE)
    width = config.d_model if direction == "up" else config.ff_width
    counted = [flops_counted(layer, torch.randn(n, width, dtype=torch.float64)) for n in (3, 10)]
    # What butterflies' levels take, no token multiplies.
    assert counted[1] - counted[0] == 7 * sum(p.flops_per_token for p in matrices)


@pytest.mark.parametrize("name", CASES)
def test_what_the_backward_pass_keeps_is_that_of_the_formula(name):
    """Beside the parameters, the input and the output: counted by storage, at two numbers of tokens."""
    config = replace(CASES[name], bias_mlp=False)
    kept = 0
    for direction in ("up", "down"):
        layer, width = built(config, direction, SINGLE), config.d_model if direction == "up" else config.ff_width
        kept += (kept_bytes(layer, width, 9) - kept_bytes(layer, width, 2)) // 7
    assert kept == 8 * kept_numbers(MLPS[config.mlp](config).kept(), tp=1, micro_batch_size=1)


def kept_bytes(layer: nn.Module, width: int, n_tokens: int) -> int:
    """In storages that the input, the output and the parameters do not have."""
    x = torch.randn(n_tokens, width, dtype=torch.float64, requires_grad=True)
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    theirs = {t.untyped_storage().data_ptr() for t in (x, y, *layer.parameters())}
    return sum(n_bytes for pointer, n_bytes in storages.items() if pointer not in theirs)


def flops_counted(layer: nn.Module, x: Tensor) -> int:
    """Of its matrix products, by torch's own count."""
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops()


WIDE = ModelConfig(n_layers=1, d_model=192, n_heads=4, seq_len=8, vocab_size=32)
WIDE_CASES = {
    "low_rank": replace(WIDE, mlp="low_rank", mlp_rank=32),
    "monarch": replace(WIDE, mlp="monarch", mlp_blocks=8),
    "monarch, gated": replace(WIDE, mlp="monarch", mlp_blocks=4, activation="geglu"),
    "butterfly": replace(WIDE, mlp="butterfly"),
    "butterfly, uneven": replace(WIDE, mlp="butterfly", d_model=160, d_ff=400),
}


@pytest.mark.parametrize("init", ["gpt2", "fan_in"])
@pytest.mark.parametrize("name", WIDE_CASES)
def test_outputs_begin_with_the_variance_of_dense_ones(name, init):
    config = replace(WIDE_CASES[name], init=init, bias_mlp=False)
    dense = replace(config, mlp="dense", mlp_rank=None, mlp_blocks=None)
    for direction in ("up", "down"):
        x = torch.randn(4000, config.d_model if direction == "up" else config.ff_width)
        theirs, ours = (
            torch.stack([made(one, direction, SINGLE, seed)(x) for seed in range(4)]).var().item()
            for one in (dense, config)
        )
        assert ours == pytest.approx(theirs, rel=0.12), direction  # 4 draws of some thousand numbers


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("low_rank", Layout(tp=2, pp=2, zero_stage=1, micro_batch_size=2)),
        ("monarch, gated", Layout(tp=2, dp=2, zero_stage=3, micro_batch_size=4, recompute=True)),
        ("butterfly, uneven", Layout(tp=2, pp=2, micro_batch_size=4)),
    ],
)
def test_layouts_agree_in_training(name, layout):
    """Losses, clipped gradient norms and weights: the parity walk on a model whose MLPs are factorised."""
    case = CASES[name]
    model = ModelConfig(
        n_layers=2, d_model=32, d_ff=80, n_heads=4, seq_len=24, vocab_size=211, dropout_residual=0.1,
        mlp=case.mlp, mlp_rank=case.mlp_rank, mlp_blocks=case.mlp_blocks, activation=case.activation,
    )  # fmt: skip
    config = parity_config(model)
    reference = run_layout(config, REFERENCE)
    require_lively(reference, config)
    difference = compare(run_layout(config, layout), reference, config)
    assert difference.ok, difference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp": "monarch"}, "model.mlp_blocks=None needs mlp_blocks"),
        ({"mlp": "low_rank"}, "model.mlp_rank=None needs mlp_rank"),
        ({"mlp_rank": 3}, "model.mlp=dense with model.mlp_rank=3 says what only low_rank has"),
        ({"mlp": "butterfly", "mlp_blocks": 4}, "says what only monarch has"),
        ({"mlp": "monarch", "mlp_blocks": 5}, "model.mlp_blocks=5 must divide d_model=12, d_ff=48; try 1, 2, 3, 4, 6"),
        ({"mlp": "low_rank", "mlp_rank": 13}, "model.mlp_rank=13 must be at most the smaller of d_model=12, d_ff=48"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        replace(BASE, **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "tp", "message"),
    [
        ("monarch", 8, "parallel.tp=8 must divide mlp_blocks=4; try 1, 2, 4"),
        ("low_rank", 5, "parallel.tp=5 must divide d_ff=48; try 1, 2, 3, 4, 6"),
        ("butterfly", 3, "parallel.tp=3 with model.mlp=butterfly of d_model=12 must be a power of two, at most 4"),
    ],
)
def test_a_tp_that_cannot_share_them_out_is_refused(name, tp, message):
    config = CASES[name]
    with pytest.raises(UserError, match=re.escape(message)):
        MLPS[config.mlp](config).check_tp(tp)
    for direction in ("up", "down"):
        with pytest.raises(UserError, match=re.escape(message)):
            made(config, direction, Axis(group=None, rank=0, size=tp))


def test_a_product_sums_in_between_and_is_no_term_of_a_sum():
    config = replace(CASES["low_rank"], bias_mlp=False)
    with pytest.raises(ValueError, match="got terms of a sum of a product of matrices"):
        mlp_matrix("up", config, SINGLE, Declared("up", declared_by(config, "up")), OPEN)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (3, 9, 14)])
def test_truncation_is_that_of_the_singular_value_decomposition(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    left, right = truncated(weight, 4)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert_close(left @ right, (u[..., :4] * s[..., None, :4]) @ v[..., :4, :])
    torch.testing.assert_close(left.norm(dim=-2), right.norm(dim=-1))


def test_truncation_of_what_has_lower_rank():
    weight = torch.outer(torch.randn(6).double(), torch.randn(9).double())
    left, right = truncated(weight, 3)
    assert left.isfinite().all() and right.isfinite().all()
    assert_close(left @ right, weight)
    left, right = truncated(torch.zeros(6, 9, dtype=torch.float64), 2)
    assert not (left @ right).any()
