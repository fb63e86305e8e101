"""Our configuration as DeepSpeed's dictionary: the only place that knows its keys."""

from __future__ import annotations

from typing import Any

from megagpt.config import RunConfig
from megagpt.plan.deepspeed_json import check_deepspeed_json
from megagpt.plan.plan import Plan


def deepspeed_settings(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """What `deepspeed.initialize` is given; a user's JSON is merged in where it does not contradict ours."""
    owned = _owned(config, plan)
    if config.train.deepspeed_config is None:
        return owned
    return check_deepspeed_json(config.train.deepspeed_config, owned)


def _owned(config: RunConfig, plan: Plan) -> dict[str, Any]:
    train, parallel = config.train, config.parallel
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": plan.micro_batches,
        # Stage 0 clips in our own hook (engine.py): DeepSpeed's counts tied and replicated parameters wrongly there.
        "gradient_clipping": config.optim.clip if parallel.zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # offload with torch's fused CPU AdamW: nothing to compile at start
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16", "loss_scale": 0.0},  # 0: dynamic
        "steps_per_print": 10**9,
    }
    if train.precision == "bf16":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
