"""state.json: what a checkpoint knows beside its tensors, and whether a run may go on from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megagpt.config import RunConfig
from megagpt.errors import UserError

NAME = "state.json"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class State:
    """The position of a run after a step.

    step: steps done. samples, tokens: consumed by them. lr: of the last step. counters: what the engine counts, the
    loss scale included. skipped_steps: those whose batch was left out (faults). config: the whole configuration,
    schedule included. data: its identity. layout: of the run that wrote this, to be shown. validation_loss: at this
    step, None where it was not measured.
    """

    step: int
    samples: int
    tokens: int
    lr: float
    counters: dict[str, float]
    config: dict[str, Any]
    data: dict[str, Any]
    layout: dict[str, int] = field(default_factory=dict)
    skipped_steps: list[int] = field(default_factory=list)
    validation_loss: float | None = None


def state_json(state: State) -> str:
    """The text of state.json. Floats are read back bit for bit."""
    return json.dumps({"format": FORMAT, **asdict(state)}, indent=1, allow_nan=False) + "\n"


def read_state(folder: Path) -> State:
    """The state of a checkpoint.  Raises UserError where it is missing, damaged, or of another format."""
    path = folder / NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("format") != FORMAT:
            raise UserError(f"{path}: unknown format; this version reads format {FORMAT}")
        state = State(**raw)
        if not all(isinstance(n, int) and n >= 0 for n in (state.step, state.samples, state.tokens)):
            raise ValueError("a count is no whole number")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint's state ({error}); load another checkpoint") from error
    return state


def check_resumable(config: RunConfig, state: State, folder: Path) -> None:
    """What a run that goes on must keep: the architecture, and what the order of the samples follows from.

    Dropout, layout, precision, learning rate and the number of steps may change.
    """
    fixed = {f"model.{name}": value for name, value in asdict(config.model).items() if "dropout" not in name}
    fixed["train.global_batch_size"] = config.train.global_batch_size
    fixed["train.seed"] = config.train.seed
    for name, ours in fixed.items():
        section, key = name.split(".")
        theirs = state.config.get(section, {}).get(key)
        if theirs != ours:
            raise UserError(
                f"{folder} was trained with {name}={theirs}, this run wants {ours}; "
                f"take the settings of that run: --config {folder.parent.parent / 'config.yaml'}"
            )
