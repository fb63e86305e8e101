"""A checkpoint and a model must have the same tensors: what only one of them has is named, never passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import UserError

_SHOWN = 5


@dataclass(frozen=True)
class Allowed:
    """What a loading may do without.

    missing: tensors that the checkpoint lacks keep their first values. unused: those that the model lacks are left.
    """

    missing: bool = False
    unused: bool = False


STRICT = Allowed()
ANY = Allowed(missing=True, unused=True)


def require_same_names(
    folder: Path,
    key: str,
    held: Iterable[str],
    wanted: Iterable[str],
    allowed: Allowed = STRICT,
    say: Callable[[str], None] = lambda line: None,
    offered: Allowed = ANY,
) -> None:
    """Raise UserError unless a checkpoint holds the tensors that a model wants, and no others, naming them.

    key: of the tensors ("weight", or of a moment). say: told of what is allowed to differ, and does. offered: what the
    flags of this program can allow.
    """
    theirs, ours = set(held), set(wanted)
    refused, remedies = [], []
    for names, is_allowed, has_flag, what, outcome, flag, effect in (
        (ours - theirs, allowed.missing, offered.missing, "holds no", "they keep their first values",
         "--allow-missing", "begins with first values"),
        (theirs - ours, allowed.unused, offered.unused, "holds, and this model has no place for,", "they are left",
         "--allow-unused", "leaves them"),
    ):  # fmt: skip
        if not names:
            continue
        told = f"{what} {key} of {shown(names)}"
        if is_allowed:
            say(f"note: {folder} {told}: {outcome} ({flag})")
        else:
            refused.append(told)
            remedies += [f"{flag} {effect}"] if has_flag else []
    if refused:
        remedies.insert(0, "take those that it was trained with")
        raise UserError(
            f"{folder} {'; it '.join(refused)}: it is of another architecture or of other code; "
            f"{', or '.join(remedies)}"
        )


def shown(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    found = sorted(names)
    return ", ".join(found[:_SHOWN]) + (f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
