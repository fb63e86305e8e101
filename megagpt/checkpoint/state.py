"""state.json: what a checkpoint knows beside its tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from megagpt.errors import UserError
from megagpt.files import require_regular

NAME = "state.json"
FORMAT = 2

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class HistoryState(TypedDict, total=False):
    """What the next step's loss and gradient norm are compared with (train/faults/spikes.py)."""

    __pydantic_config__ = _STRICT  # pyright: ignore[reportGeneralTypeIssues]
    losses: list[float]
    log_norms: list[float]
    spiking: bool


class GuardState(TypedDict, total=False):
    """What the guard of a run knows (train/faults/guard.py)."""

    __pydantic_config__ = _STRICT  # pyright: ignore[reportGeneralTypeIssues]
    history: HistoryState
    n_bad: int


class NoiseState(TypedDict, total=False):
    """Averages of the gradient noise scale (train/measure/noise_scale.py)."""

    __pydantic_config__ = _STRICT  # pyright: ignore[reportGeneralTypeIssues]
    signal: float
    noise: float


class DataState(TypedDict, total=False):
    """Which text a run reads, and by which tokenizer."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)  # pyright: ignore[reportGeneralTypeIssues]
    data_path: list[str]
    index_sha256: list[str]
    split: str
    tokenizer_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class State:
    """The position of a run after a step.

    step: steps done. samples, tokens: consumed by them. lr: of the last step. counters: what the engine counts, the
    loss scale included. skipped_steps: those whose batch is left out (faults). guard: what the next step is judged by
    (train/faults/guard.py). noise_scale: its averages, where it is measured. config: the whole configuration, schedule
    included. data: its identity. layout: of the run that wrote this, to be shown. validation_loss: at this step, None
    where it was not measured. validation_score: of a task, the higher the better; where there is one, the best
    checkpoint is by that. origin: how it came to be, where not by training ("mean of …"). base_sha256: where it holds
    adapters, of the weights that they are for (adapters.py).
    """

    __pydantic_config__ = _STRICT

    step: int
    samples: int
    tokens: int
    lr: float
    counters: dict[str, float]
    config: dict[str, dict[str, Any]]
    data: DataState
    layout: dict[str, int] = field(default_factory=dict)
    skipped_steps: list[int] = field(default_factory=list)
    guard: GuardState = field(default_factory=GuardState)
    noise_scale: NoiseState = field(default_factory=NoiseState)
    validation_loss: float | None = None
    validation_score: float | None = None
    origin: str = ""
    base_sha256: str = ""


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
        skipped, scale = state.counters.get("skipped_steps", -1), state.counters.get("cur_scale", 1)
        if state.counters and (skipped not in range(state.step + 1) or scale <= 0):
            raise ValueError("a counter is not what a run counts")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; load another checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint's state ({error}); load another checkpoint") from None
    return state


def _no_number(name: str) -> float:
    raise ValueError(f"it holds {name}")
