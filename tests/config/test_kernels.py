"""The switch `--kernels`: what it means, and what is wrong with it."""

from __future__ import annotations

import pytest

from megagpt.config.kernels import AUTO, Kernels
from megagpt.errors import UserError
from megagpt.model.gpt import GPT  # noqa: F401  # declares the ops that a model uses
from megagpt.model.ops_used import check_kernels, kernel_rows
from megagpt.ops.library import MISSING_KERNELS

OPS = ["norm", "softmax"]


def test_attention_has_choices_of_its_own():
    chosen = {"auto": "auto", "auto,attention=flex": "flex", "cpu": "softmax", "reference": "reference"}
    chosen |= {"auto,softmax=cpu": "softmax", "auto,softmax=reference": "reference", "reference,softmax=auto": "auto"}
    assert {text: Kernels.parse(text)["attention"] for text in chosen} == chosen
    kernels = Kernels.parse("auto,attention=reference")
    assert [kernels[op] for op in ("attention", "softmax", "norm")] == ["reference", "reference", "auto"]
    assert Kernels.parse("reference,attention=softmax,softmax=cpu")["softmax"] == "cpu"
    with pytest.raises(UserError, match=r"'cpu' is no choice for attention; use auto \| sdpa \| flex"):
        Kernels.parse("auto,attention=cpu")
    with pytest.raises(UserError, match=r"'flex' is no choice; use auto \| cuda"):
        Kernels.parse("auto,softmax=flex")


def test_a_choice_for_all_and_exceptions():
    kernels = Kernels.parse("reference, norm=cpu,softmax=auto")
    assert [kernels[op] for op in ("norm", "softmax", "activation")] == ["cpu", "auto", "reference"]
    assert Kernels.parse("auto") == Kernels.parse("") == AUTO


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("auto,sofmax=cpu", "the op sofmax, which does not exist; did you mean softmax"),
        ("auto,zzz=cpu", "there are activation"),
        ("auto,attention=flex", "FlexAttention cannot train on the cpu"),
        ("cuda", "train.kernels=cuda for norm, but this run is on the cpu; use auto or cpu"),
    ],
)
def test_what_cannot_run_is_said_before_the_start(text, message):
    with pytest.raises(UserError, match=message):
        check_kernels(Kernels.parse(text), OPS, "cpu")


@pytest.mark.skipif(MISSING_KERNELS is not None, reason=f"no compiled kernels: {MISSING_KERNELS}")
def test_rows_say_what_runs_and_why():
    check_kernels(Kernels.parse("cpu"), OPS, "cpu")
    rows = kernel_rows(Kernels.parse("auto,norm=reference"), OPS, "cpu")
    assert rows == [("norm", "reference", "asked for"), ("softmax", "cpu kernel", "built")]
