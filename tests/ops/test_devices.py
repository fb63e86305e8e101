"""Every op refuses tensors of two devices, which its kernel would read as if they lay on one."""

from __future__ import annotations

import pytest
import torch

from tests.ops.case import Arguments, Case, Draw, Spec, all_specs


def made(case: Case) -> Arguments:
    return case.make(Draw(torch.float32, "cpu"))


def plain_cases(spec: Spec) -> list[Case]:
    """Those that call the op itself."""
    return [case for case in spec.cases if case.call is spec.call]


NAMED = [
    pytest.param(spec, name, id=f"{spec.op}-{name}")
    for spec in all_specs()
    if spec.branches  # a chain's ops are those of the others
    for case in [max(plain_cases(spec), key=lambda case: len(made(case)))]
    for name, value in list(made(case).items())[1:]
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize(("spec", "name"), NAMED)
def test_a_tensor_of_another_device_is_named(spec, name: str):
    arguments = next(a for a in map(made, plain_cases(spec)) if isinstance(a.get(name), torch.Tensor))
    arguments[name] = arguments[name].detach().to("meta")
    what = name.partition("_")[0] if name != "sample_ids_B" else "sample_ids"
    with pytest.raises(ValueError, match=rf"got {what} on meta, wanted cpu, where the first tensor is"):
        spec.call(**arguments)


def test_every_op_with_several_tensors_is_asked():
    assert {param.values[0].op for param in NAMED} >= {
        "norm", "activation", "rotary", "softmax", "dropout", "bias_dropout_add", "cross_entropy",
    }  # fmt: skip
