"""Our configuration as DeepSpeed's dictionary: the only place that knows its keys. No torch: asked before any start.

Of a user's JSON passes through what megagpt does not own; what contradicts it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.cli.translate import look_up
from megagpt.config import RunConfig
from megagpt.errors import UserError
from megagpt.files import os_reason

if TYPE_CHECKING:
    from megagpt.plan.plan import Plan

# Gradients in one reduction of ZeRO on a CPU: 16 MiB stay near its caches, where DeepSpeed's 500 M would be a buffer
# of 2 GB. A GPU's links want the large one.
CPU_BUCKET = 4 * 2**20

# DeepSpeed's key: (our key, the flag that sets it; empty where it follows from others)
OWNERS = {
    "train_batch_size": ("train.global_batch_size", "--global-batch-size"),
    "train_micro_batch_size_per_gpu": ("train.micro_batch_size", "--micro-batch-size"),
    "gradient_accumulation_steps": ("the plan's micro_batches", ""),
    "gradient_clipping": ("optim.clip", "--clip"),
    "zero_optimization.stage": ("parallel.zero_stage", "--zero-stage"),
    "bf16.enabled": ("train.precision bf16", "--precision"),
    "fp16.enabled": ("train.precision fp16", "--precision"),
    "zero_optimization.offload_optimizer.device": ("parallel.offload_optimizer", "--parallel.offload-optimizer"),
}
SECTIONS_OURS = {  # whole sections that megagpt builds itself
    "optimizer": "--lr, --weight-decay and the other flags of the optim section",
    "scheduler": "--lr, --warmup-steps and --optim.decay-steps",
}


def deepspeed_settings(config: RunConfig, plan: Plan, on_gpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` is given: ours, and what a user's JSON adds without contradicting it.

    Raises: UserError where that JSON cannot be read, or contradicts.
    """
    settings = _owned(config, plan)
    if config.train.deepspeed_config is not None:
        settings = check_deepspeed_json(config.train.deepspeed_config, settings)
        if config.lora.rank is not None:
            _require_unquantized(config.train.deepspeed_config, settings)
    settings.setdefault("steps_per_print", 10**9)
    if config.train.precision == "bf16":  # DeepSpeed would add up gradients in fp32, and then round them to be sent
        settings.setdefault("communication_data_type", "fp32")
    if not config.parallel.offload_optimizer:
        del settings["zero_optimization"]["offload_optimizer"]
    if not on_gpu:
        largest_stage = max(stage.params_local for stage in plan.stages)
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(CPU_BUCKET, largest_stage))
    settings["zero_optimization"]["stage"] = plan.zero_stage
    if plan.zero_stage == 0:
        # The engine clips: DeepSpeed counts tied and replicated weights wrongly here.
        settings["gradient_clipping"] = 0.0
    return settings


def _require_unquantized(path: str, settings: Mapping[str, Any]) -> None:
    key = "zero_quantized_nontrainable_weights"
    if settings["zero_optimization"].get(key):
        raise UserError(f"{path}: zero_optimization.{key} keeps 8 bits of the base's weights; remove the key")


def _owned(config: RunConfig, plan: Plan) -> dict[str, Any]:
    train, parallel = config.train, config.parallel
    device = "cpu" if parallel.offload_optimizer else "none"
    zero: dict[str, Any] = {"stage": parallel.zero_stage, "offload_optimizer": {"device": device}}
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
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused CPU AdamW: nothing to compile at the start
    if train.precision == "bf16":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def check_deepspeed_json(path: str, owned: Mapping[str, Any]) -> dict[str, Any]:
    """Read a DeepSpeed JSON and merge it under `owned`, DeepSpeed's dictionary as our configuration has it.

    A value that equals ours, or is "auto", passes; a key that `owned` lacks is passed through.
    Raises: UserError naming both keys where they contradict, or where the file cannot be read.
    """
    whole = _read_object(path)
    given = _offload_as_now(_without_auto(whole))
    wrong = []
    for section, flags in SECTIONS_OURS.items():
        if _says_only_its_type(whole.get(section)):
            given.pop(section, None)
        elif section in given and given[section] != owned.get(section):
            wrong.append(f"{section} contradicts megagpt's own; remove the key and use {flags}")
    wrong += [_explain(key, theirs, ours) for key, theirs, ours in _contradictions(given, owned)]
    if wrong:
        raise UserError(f"{path}: {wrong[0]}", lines=[f"  {line}" for line in wrong[1:]])
    return _merge(given, owned)


def _says_only_its_type(section: Any) -> bool:
    """Whether an optimizer or scheduler leaves all its parameters to us: "auto", as files for transformers have it."""
    parameters = section.get("params") if isinstance(section, dict) else None
    return bool(parameters) and isinstance(parameters, dict) and set(map(str, parameters.values())) == {"auto"}


def types_not_taken(config: RunConfig) -> Iterator[str]:
    """A note for each optimizer or scheduler of the JSON that the run's own takes the place of, being another one."""
    path, optim = config.train.deepspeed_config, config.optim
    whole = {} if path is None else _read_object(path)
    ours = {"optimizer": ("optim.optimizer", optim.optimizer), "scheduler": ("optim.schedule", optim.schedule)}
    for section, (key, value) in ours.items():
        if _says_only_its_type(whole.get(section)):
            theirs = str(whole[section].get("type"))
            advice = look_up(f"{section}.type", theirs, {"min-lr": ""})
            if advice is None or advice.settings != {key: value}:
                yield f"note: {path}: {section} {theirs} leaves its values to the run, whose own {key}={value} it is"


def _offload_as_now(given: dict[str, Any]) -> dict[str, Any]:
    """With DeepSpeed's older zero_optimization.cpu_offload under its newer name."""
    zero = given.get("zero_optimization")
    if not isinstance(zero, dict) or "cpu_offload" not in zero:
        return given
    rest = {key: value for key, value in zero.items() if key != "cpu_offload"}
    device = {"device": "cpu" if zero["cpu_offload"] else "none"}
    return {**given, "zero_optimization": {"offload_optimizer": device, **rest}}


def _explain(key: str, theirs: Any, ours: Any) -> str:
    name, flag = OWNERS.get(key, ("megagpt's own", ""))
    remedy = "remove the key"
    if flag == "--precision":
        remedy += ", or use --precision " + (key.split(".")[0] if theirs is True else "fp32")
    elif flag and theirs in ("cpu", "none"):
        remedy += f" or use {flag if theirs == 'cpu' else flag.replace('.', '.no-')}"
    elif flag and isinstance(theirs, int | float):
        remedy += f" or use {flag} {theirs}"
    return f"{key}={json.dumps(theirs)} contradicts {name}={json.dumps(ours)}; {remedy}"


def _contradictions(given: Mapping, owned: Mapping, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, their value, our value) of each leaf that both have and that differs."""
    for key, theirs in given.items():
        if key not in owned:
            continue
        ours = owned[key]
        if isinstance(theirs, dict) and isinstance(ours, Mapping):
            yield from _contradictions(theirs, ours, f"{prefix}{key}.")
        elif theirs != ours or isinstance(theirs, bool) != isinstance(ours, bool):
            yield f"{prefix}{key}", theirs, ours


def _merge(given: Mapping[str, Any], owned: Mapping[str, Any]) -> dict[str, Any]:
    """`owned` with what only `given` has added, at every depth."""
    merged = dict(given)
    for key, ours in owned.items():
        theirs = given.get(key)
        if isinstance(theirs, dict) and isinstance(ours, Mapping):
            merged[key] = _merge(theirs, ours)
        else:
            merged[key] = ours
    return merged


def _without_auto(given: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that leave the choice to us: "auto", as users of transformers write."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in given.items()
        if value != "auto"
    }


def _read_object(path: str) -> dict[str, Any]:
    try:
        value = json.loads(
            Path(path).read_text(encoding="utf-8-sig"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)}); check --deepspeed_config") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (json.JSONDecodeError, _BadJsonError) as error:
        raise UserError(f"{path}: {error}; mend the JSON") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deep; mend the JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: got {type(value).__name__} at the top, wanted an object; write {{...}}")
    return value


class _BadJsonError(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _BadJsonError(f"key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return result


def _refuse_constant(name: str) -> None:
    raise _BadJsonError(f"{name} is not a number that JSON has")
