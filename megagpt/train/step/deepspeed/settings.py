"""Our configuration as DeepSpeed's dictionary: the only place that knows its keys."""

from __future__ import annotations

from typing import Any

import torch

from megagpt.config import RunConfig
from megagpt.plan.plan import Plan
from megagpt.train.step.deepspeed.user_json import check_deepspeed_json

# Gradients in one reduction of ZeRO on a CPU: 16 MiB stay near its caches, where DeepSpeed's 500 M would be a buffer
# of 2 GB. A GPU's links want the large one.
CPU_BUCKET = 4 * 2**20


def deepspeed_settings(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """What `deepspeed.initialize` is given: ours, and what a user's JSON adds without contradicting it."""
    settings = _owned(config, plan)
    if config.train.deepspeed_config is not None:
        settings = check_deepspeed_json(config.train.deepspeed_config, settings)
    settings.setdefault("steps_per_print", 10**9)
    if config.train.precision == "bf16":  # DeepSpeed would add up gradients in fp32, and then round them to be sent
        settings.setdefault("communication_data_type", "fp32")
    if not torch.cuda.is_available():
        largest_stage = max(stage.params_local for stage in plan.stages)
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(CPU_BUCKET, largest_stage))
    settings["zero_optimization"]["stage"] = plan.zero_stage
    if plan.zero_stage == 0:
        # The engine clips: DeepSpeed counts tied and replicated weights wrongly here.
        settings["gradient_clipping"] = 0.0
    return settings


def _owned(config: RunConfig, plan: Plan) -> dict[str, Any]:
    train, parallel = config.train, config.parallel
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    settings: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": plan.micro_batches,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # its list knows Adam alone; the parity walk knows ours
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16"},
    }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused CPU AdamW: nothing to compile at the start
    if train.precision == "bf16":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
