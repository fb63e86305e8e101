"""What a launcher says of this process in its environment, checked: torchrun, DeepSpeed's, Slurm by our recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.errors import UserError, require

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MAX_PORT = 65535


@dataclass(frozen=True)
class Launched:
    """One process of several. local_rank: its number on its machine. host, port: where all of them meet.

    on_one_machine: whether the launcher says that all are.
    """

    rank: int
    local_rank: int
    world_size: int
    host: str
    port: int
    on_one_machine: bool


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """The place of this process; None where no launcher has started it.

    Raises UserError for an environment that no launcher leaves: half of it set by hand, or left over.
    """
    words = {name: environment.get(name, "") for name in NAMES}
    if not words["RANK"] and words["WORLD_SIZE"] in ("", "1"):
        return None
    missing = [name for name in NAMES if not words[name]]
    there = ", ".join(f"{name}={word}" for name, word in words.items() if word)
    require(
        not missing,
        f"the environment has {there}, but no {' and no '.join(missing)};",
        f"a launcher sets all of {', '.join(NAMES)}",
        "start by one (torchrun, deepspeed), or unset them",
    )
    world_size, port = _number(words, "WORLD_SIZE", 1), _number(words, "MASTER_PORT", 1, MAX_PORT)
    rank = _number(words, "RANK", 0, world_size - 1)
    local_rank = _number({"LOCAL_RANK": environment.get("LOCAL_RANK", "0")}, "LOCAL_RANK", 0)
    here = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")  # torchrun's; DeepSpeed's
    return Launched(rank, local_rank, world_size, words["MASTER_ADDR"], port, here == words["WORLD_SIZE"])


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process says what all ranks find: rank 0 does, and whoever the environment makes no rank at all."""
    words = [environment.get(name, "") for name in NAMES]
    rank, world_size = (int(word) if re.fullmatch("[0-9]{1,9}", word) else 0 for word in words[:2])
    return not (all(words) and 0 < rank < world_size)


def n_processes() -> int:
    """How many processes a launcher has started for this program; 1 without one."""
    place = launched()
    return place.world_size if place else 1


def _number(words: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    word = words[name]
    wanted = f"{least} to {most}" if most is not None else f"{least} or more"
    if not (word.isascii() and word.isdigit() and len(word) < 10 and least <= int(word)) or (
        most is not None and int(word) > most
    ):
        raise UserError(
            f"{name}={word} in the environment, wanted {wanted}; start by a launcher that sets it (torchrun, "
            "deepspeed), or unset it"
        )
    return int(word)
