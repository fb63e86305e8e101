"""state.json: what a checkpoint knows beside its tensors, and whether a run may go on from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megagpt.config import RunConfig, plain
from megagpt.errors import UserError
from megagpt.files import require_regular
from megagpt.schedule import Schedule

NAME = "state.json"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class State:
    """The position of a run after a step.

    step: steps done. samples, tokens: consumed by them. lr: of the last step. counters: what the engine counts, the
    loss scale included. skipped_steps: those whose batch is left out (faults). guard: what the next step is judged by
    (train/faults/guard.py). noise_scale: its averages, where it is measured. config: the whole configuration, schedule
    included. data: its identity. layout: of the run that wrote this, to be shown. validation_loss: at this step, None
    where it was not measured. origin: how it came to be, where not by training ("mean of …").
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    step: int
    samples: int
    tokens: int
    lr: float
    counters: dict[str, float]
    config: dict[str, Any]
    data: dict[str, Any]
    layout: dict[str, int] = field(default_factory=dict)
    skipped_steps: list[int] = field(default_factory=list)
    guard: dict[str, Any] = field(default_factory=dict)
    noise_scale: dict[str, float] = field(default_factory=dict)
    validation_loss: float | None = None
    origin: str = ""


_CHECKED = TypeAdapter(State)


def state_json(state: State) -> str:
    """The text of state.json. Floats are read back bit for bit."""
    return json.dumps({"format": FORMAT, **asdict(state)}, indent=1, allow_nan=False) + "\n"


def read_state(folder: Path) -> State:
    """The state of a checkpoint.  Raises UserError where it is missing, damaged, or of another format."""
    path = folder / NAME
    try:
        require_regular(path)
        raw = json.loads(path.read_bytes(), parse_constant=_no_number)
        if not isinstance(raw, dict) or "format" not in raw:
            raise ValueError("it names no format")
        if (got := raw.pop("format")) != FORMAT:
            raise UserError(f"{path}: format {got!r}; this version reads format {FORMAT}, use the one that wrote it")
        state = _CHECKED.validate_json(json.dumps(raw))  # as JSON: from Python, strict would want a State
        if min(state.step, state.samples, state.tokens) < 0:
            raise ValueError("a count is negative")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; load another checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint's state ({error}); load another checkpoint") from None
    return state


def check_resumable(config: RunConfig, state: State, folder: Path) -> None:
    """What a run that goes on must keep: the architecture, the optimizer, and what the samples' order follows from.

    Dropout, layout, precision, learning rate and the number of steps may change, and batches that are still to come.
    Weights that no sample was consumed for (imported ones) keep the architecture alone.
    """
    if state.origin and state.step > 0:
        raise UserError(
            f"{folder} is a {state.origin}: weights without the optimizer's moments, to evaluate, generate and export; "
            "to go on training, load one that a run saved"
        )
    settings, defaults = plain(config), plain(RunConfig())
    fixed = {f"model.{name}": value for name, value in settings["model"].items() if "dropout" not in name}
    if state.samples > 0:
        fixed["train.seed"] = config.train.seed
    if state.step > 0:
        fixed["optim.optimizer"] = config.optim.optimizer  # what it keeps of a weight
    for name, ours in fixed.items():
        section, key = name.split(".")
        theirs = state.config.get(section, {}).get(key, defaults[section][key])  # an older one lacks newer settings
        if theirs != ours:
            raise UserError(
                f"{folder} was trained with {name}={theirs}, this run wants {ours}; "
                f"take the settings of that run: --config {folder.parent.parent / 'config.yaml'}"
            )
    if state.samples > 0:
        _check_position(config, state, folder)


def _check_position(config: RunConfig, state: State, folder: Path) -> None:
    """The next step must read on where that run stopped: no sample twice, and none left out."""
    schedule = Schedule(config)
    ours = schedule.samples_before(state.step), schedule.tokens_before(state.step)
    if ours != (state.samples, state.tokens):
        was, now = state.config.get("train", {}).get("global_batch_size"), config.train.global_batch_size
        raise UserError(
            f"{folder} has read {state.samples:,} samples, {state.tokens:,} tokens in {state.step:,} steps, this run "
            f"would have read {ours[0]:,} samples, {ours[1]:,} tokens; keep train.global_batch_size, its ramp and that "
            f"of seq_len, or change the batch from here on: --train.batch-steps {was}@1,{now}@{state.step + 1}"
        )


def _no_number(name: str) -> float:
    raise ValueError(f"it holds {name}")
