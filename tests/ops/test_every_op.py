"""Every op over every case of tests/ops/cases, in every number format that its kernels take.

    pytest tests/ops -k softmax         the loop while writing a kernel

tests/ops/test_cuda.py runs this file once more with the CUDA kernels, emulated on the CPU.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megagpt.ops.library import EMULATED_CUDA, KERNEL_DTYPES, MISSING_KERNELS
from tests.ops import proof
from tests.ops.case import Case, Spec, all_specs

SPECS = all_specs()
CASES = [pytest.param(case, id=f"{spec.op}-{case.name}") for spec in SPECS for case in spec.cases]
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in KERNEL_DTYPES["cpu"]]
SOURCES = Path(__file__).parents[2] / "csrc"
pytestmark = pytest.mark.skipif(MISSING_KERNELS is not None, reason=f"no compiled kernels: {MISSING_KERNELS}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_reference_in_float64(case: Case, dtype: torch.dtype):
    proof.check_values(case, dtype)


@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.op) for spec in SPECS if spec.widths])
def test_widths_of_presets_are_those_of_the_reference(spec: Spec):
    """In 16 bits, where a thread holds most, and shared memory with it."""
    for case in spec.widths:
        proof.check_values(case, torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_non_contiguous_inputs_give_the_same(case: Case):
    proof.check_non_contiguous(case, torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_threads_do_not_matter(case: Case):
    proof.check_threads(case, torch.float32)


@pytest.mark.parametrize("case", [p for p in CASES if not p.values[0].nan])
def test_registration(case: Case):
    proof.check_registration(case, torch.float32)


@pytest.mark.skipif(bool(EMULATED_CUDA), reason="CUDA kernels have no float64")
@pytest.mark.parametrize("case", [p for p in CASES if p.values[0].gradcheck])
def test_gradients_equal_finite_differences(case: Case):
    proof.check_gradient(case)


@pytest.mark.skipif(bool(EMULATED_CUDA), reason="the same registration as without emulation")
@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.op) for spec in SPECS])
def test_compiles_into_one_graph(spec: Spec):
    """As far as a custom op can go wrong there; `make gpu-check` lets inductor compile what is around it too."""
    proof.check_compiles(spec.cases[-1], torch.float32, backend="aot_eager")


@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.op) for spec in SPECS])
def test_cases_have_what_breaks_kernels(spec: Spec):
    makes = [(case, case.make(proof.Draw(torch.float32, "cpu"))) for case in spec.cases]
    tensors = [[v for v in arguments.values() if proof.differentiable(v)] for _, arguments in makes]
    assert any(all(t.numel() == 0 for t in given) for given in tensors), "no empty case"
    assert any(all(t.numel() == 1 for t in given) for given in tensors), "no case of one element"
    assert any(not t.isfinite().all() for given in tensors for t in given), "no case with inf or NaN"
    assert any(case.gradcheck for case, _ in makes), "no case for gradcheck"


@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.op) for spec in SPECS if spec.branches])
def test_each_branch_is_reached(spec: Spec):
    """A kernel that no input reaches is not proven by anything above."""
    source = (SOURCES / f"{spec.op}.{'cu' if EMULATED_CUDA else 'cpp'}").read_text()
    wanted = set(re.findall(r'MEGAGPT_BRANCH\("([^"]+)"\)', source))
    assert wanted, f"{spec.op} names no branch"
    for case in spec.cases:
        for dtype in KERNEL_DTYPES["cpu"]:
            proof.run(case, case.make(proof.Draw(dtype, "cpu")), "cpu")
    assert not wanted - set(torch.ops.megagpt.branches_reached())
