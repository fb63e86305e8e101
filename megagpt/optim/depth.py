"""How fast each parameter of a fine-tuned model learns: slower far from the task, and not at all where it is frozen.

No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.config import RunConfig

_BLOCK = re.compile(r"blocks\.(\d+)")
_RANGE = re.compile(r"blocks\.(\d+)-(\d+)(\..*)?")


def rate_of(name: str, run: RunConfig) -> float:
    """What the learning rate of a parameter is multiplied with: layer_decay for each layer above its own, the head the
    uppermost; 0 where it is frozen.

    name: canonical, a tied matrix being the embedding's.
    Source: Howard & Ruder 2018, section 3.2 (discriminative fine-tuning), by a constant factor.
    """
    if is_frozen(name, run.finetune.frozen):
        return 0.0
    n_layers, block = run.model.n_layers, _BLOCK.match(name)
    depth = int(block[1]) + 1 if block else 0 if name.startswith("embedding.") else n_layers + 1
    return run.finetune.layer_decay ** (n_layers + 1 - depth)


def is_frozen(name: str, parts: Iterable[str]) -> bool:
    """Whether a parameter lies in one of these parts."""
    return any(name == part or name.startswith(f"{part}.") for listed in parts for part in _parts(listed))


def require_parts(names: Sequence[str], parts: Iterable[str]) -> None:
    """Raises UserError for a part that the model has nothing of, and where nothing is left to learn."""
    for part in parts:
        if not any(is_frozen(name, [part]) for name in names):
            remedy = f"name embedding, blocks.0-5, blocks.3.mlp, head, or a parameter such as {names[-1]}"
            raise UserError(f"finetune.frozen={part}", "is no part of this model", remedy, ["finetune.frozen"])
    if all(is_frozen(name, parts) for name in names):
        raise UserError("finetune.frozen", "leaves nothing to learn", "name fewer parts", ["finetune.frozen"])


def _parts(listed: str) -> list[str]:
    """blocks.0-5.mlp → blocks.0.mlp … blocks.5.mlp."""
    found = _RANGE.fullmatch(listed)
    return (
        [listed] if found is None else [f"blocks.{i}{found[3] or ''}" for i in range(int(found[1]), int(found[2]) + 1)]
    )
