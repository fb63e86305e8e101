"""A user's DeepSpeed JSON beside our configuration: merged, or refused with both names."""

from __future__ import annotations

import json

import pytest

from megagpt.errors import UserError
from megagpt.train.step.deepspeed.settings import check_deepspeed_json

OWNED = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
}


def check(tmp_path, given: object) -> dict:
    file = tmp_path / "ds.json"
    file.write_text(given if isinstance(given, str) else json.dumps(given))
    return check_deepspeed_json(str(file), OWNED)


def test_what_we_do_not_own_passes_through(tmp_path):
    given = {"zero_optimization": {"overlap_comm": True}, "comms_logger": {"enabled": True}}
    expected = {**OWNED, **given, "zero_optimization": {"overlap_comm": True, "stage": 1}}
    assert check(tmp_path, given) == expected


def test_equal_and_auto_pass(tmp_path):
    assert check(tmp_path, OWNED) == OWNED
    auto = {"train_batch_size": "auto", "optimizer": "auto", "zero_optimization": {"stage": "auto"}, "x": "auto"}
    assert check(tmp_path, auto) == OWNED
    assert check(tmp_path, {"gradient_clipping": 1}) == OWNED


CONTRADICTIONS = {
    "stage": (
        {"zero_optimization": {"stage": 2}},
        "zero_optimization.stage=2 contradicts parallel.zero_stage=1; remove the key or use --zero-stage 2",
    ),
    "batch": (
        {"train_batch_size": 32},
        "train_batch_size=32 contradicts train.global_batch_size=16; remove the key or use --global-batch-size 32",
    ),
    "micro-batch": ({"train_micro_batch_size_per_gpu": 1}, "remove the key or use --micro-batch-size 1"),
    "accumulation": (
        {"gradient_accumulation_steps": 8},
        "gradient_accumulation_steps=8 contradicts the plan's micro_batches=4; remove the key",
    ),
    "clipping": ({"gradient_clipping": 0.5}, "contradicts optim.clip=1.0; remove the key or use --clip 0.5"),
    "fp16": ({"fp16": {"enabled": True}}, "remove the key, or use --precision fp16"),
    "bf16": ({"bf16": {"enabled": False}}, "remove the key, or use --precision fp32"),
    "switch for a number": ({"zero_optimization": {"stage": True}}, "stage=true contradicts parallel.zero_stage=1"),
    "section for a value": ({"train_batch_size": {"a": 1}}, 'train_batch_size={"a": 1} contradicts'),
    "optimizer": ({"optimizer": {"type": "Adam"}}, "optimizer contradicts megagpt's own; remove the key and use --lr"),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "scheduler contradicts megagpt's own; remove the key"),
}
BROKEN = {
    "not JSON": ("{", "line 1"),
    "NaN": ('{"gradient_clipping": NaN}', "NaN is not a number that JSON has"),
    "key twice": ('{"a": 1, "a": 2}', "key 'a' is there twice"),
    "a list": ("[]", "got list at the top, wanted an object"),
    "empty": ("", "line 1"),
    "nested deep": ("[" * 1_000_000, "nested too deep"),
}


@pytest.mark.parametrize("name", [*CONTRADICTIONS, *BROKEN])
def test_what_is_refused_is_one_line(name, tmp_path):
    given, expected = {**CONTRADICTIONS, **BROKEN}[name]
    with pytest.raises(UserError) as caught:
        check(tmp_path, given)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'ds.json'}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        check_deepspeed_json(str(tmp_path / "none.json"), OWNED)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UserError, match="byte 7 is not UTF-8"):
        check_deepspeed_json(str(tmp_path / "latin.json"), OWNED)
