"""A user's DeepSpeed JSON beside our configuration: merged, or refused with both names."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest

from megagpt.cli import parse_run_config
from megagpt.errors import UserError
from megagpt.plan.plan import make_plan
from megagpt.train.pretrain import ranks_to_start
from megagpt.train.step.deepspeed.settings import check_deepspeed_json, deepspeed_settings, types_not_taken

OWNED = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
}


def check(tmp_path, given: object) -> dict:
    file = tmp_path / "ds.json"
    file.write_text(given if isinstance(given, str) else json.dumps(given))
    return check_deepspeed_json(str(file), OWNED)


def test_what_we_do_not_own_passes_through(tmp_path):
    given = {"zero_optimization": {"overlap_comm": True}, "comms_logger": {"enabled": True}}
    expected = {**OWNED, **given, "zero_optimization": {"overlap_comm": True, **OWNED["zero_optimization"]}}
    assert check(tmp_path, given) == expected


def test_equal_and_auto_pass(tmp_path):
    assert check(tmp_path, OWNED) == OWNED
    auto = {"train_batch_size": "auto", "optimizer": "auto", "zero_optimization": {"stage": "auto"}, "x": "auto"}
    assert check(tmp_path, auto) == OWNED
    assert check(tmp_path, {"gradient_clipping": 1}) == OWNED


# transformers' own example for its Trainer, shortened.
OF_TRANSFORMERS = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    "zero_optimization": {"stage": "auto", "overlap_comm": True, "reduce_bucket_size": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def test_auto_everywhere_passes_and_another_schedule_is_noted(tmp_path):
    merged = check(tmp_path, OF_TRANSFORMERS)
    assert merged["fp16"] == {"enabled": False, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16}
    assert "optimizer" not in merged and "scheduler" not in merged
    config = parse_run_config(["--deepspeed-config", str(tmp_path / "ds.json")])
    (note,) = types_not_taken(config)
    assert "scheduler WarmupLR leaves its values to the run, whose own optim.schedule=cosine" in note
    assert not list(types_not_taken(parse_run_config([])))


def test_all_contradictions_are_told_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        check(tmp_path, {"train_batch_size": 32, "gradient_clipping": 0.5, "scheduler": {"type": "WarmupLR"}})
    assert len(caught.value.lines) == 2


def test_it_is_read_before_torch_is_loaded(tmp_path):
    """A missing file, and an offload that the run knows nothing of."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    for name, told in (("none.json", "No such file"), ("ds.json", "contradicts parallel.offload_optimizer")):
        config = parse_run_config(["--deepspeed-config", str(tmp_path / name)])
        with pytest.raises(UserError, match=told):
            ranks_to_start(config)
    code = "import sys, megagpt.train.pretrain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_base_is_read_into_no_8_bits(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"zero_quantized_nontrainable_weights": true}}')
    given = ["--deepspeed-config", str(tmp_path / "ds.json"), "--vocab-size", "64"]
    for rank in (None, 2):
        config = parse_run_config([*given, *([] if rank is None else ["--lora.rank", str(rank)])])
        with pytest.raises(UserError, match="remove the key") if rank else nullcontext():
            deepspeed_settings(config, make_plan(config, 1), on_gpu=True)


CONTRADICTIONS = {
    "offload": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}},
        'offload_optimizer.device="cpu" contradicts parallel.offload_optimizer="none"; remove the key or use '
        "--parallel.offload-optimizer",
    ),
    "offload under its older name": (
        {"zero_optimization": {"cpu_offload": True}},
        "remove the key or use --parallel.offload-optimizer",
    ),
    "offload to a disk": (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
        'contradicts parallel.offload_optimizer="none"; remove the key',
    ),
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
