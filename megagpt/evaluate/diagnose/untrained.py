"""Tokens that training never showed, told by their rows of the embedding: where the training data is not at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.evaluate.answers import Answers
from megagpt.inventory.layers import TIED

LEAST, MOST = 8, 256  # tokens that no text gives: so many are needed, so many looked at
LIKE = 2.0  # times as far from their middle as half of them are


def untrained(answers: Answers) -> np.ndarray | None:
    """Which tokens look as if training never showed them; None where that cannot be told.

    The row of a token that training shows goes its own way; the others stay where they began, or are pushed all alike
    where the matrix is that of the output too. Of tokens that no text gives (`unreachable`) it is known that training
    did not show them, and a row that is as near to their middle as they are is taken to be one of them.

    Shapes: → [V] bool.  Comm: gathers a few rows, and a number a row, over all ranks.
    Source: Land & Bartolo 2024 (Fishing for Magikarp), of tied and untied embeddings.
    """
    reference = unreachable(answers)[:MOST]
    if len(reference) < LEAST:
        return None
    first, rows_VD = own_rows(answers)
    own = reference[(reference >= first) & (reference < first + len(rows_VD))] - first
    middle_D = torch.from_numpy(np.median(np.concatenate(gathered(rows_VD[own].numpy())), axis=0))
    far_V = np.concatenate(gathered((rows_VD - middle_D).norm(dim=1).numpy()))
    limit = LIKE * np.median(far_V[reference])
    rest = far_V[far_V >= limit]
    return far_V < limit if len(rest) and LIKE * limit < np.median(rest) else None


def unreachable(answers: Answers) -> np.ndarray:
    """Tokens whose own text is not encoded as they are, and rows beyond the tokenizer's.  Shapes: → [n] int64."""
    tokenizer, vocab = answers.tokenizer, answers.trained.config.model.vocab
    marks = {tokenizer.eod, *answers.trained.bounds.begin, *answers.trained.bounds.ends}
    n = min(tokenizer.vocab_size, vocab)
    encoded = tokenizer.encode_batch([tokenizer.decode([i]) for i in range(n)])
    found = [i for i, ids in enumerate(encoded) if list(ids) != [i] and i not in marks]
    return np.array([*found, *range(n, vocab)], dtype=np.int64)


def own_rows(answers: Answers) -> tuple[int, Tensor]:
    """The rows of the embedding that this rank speaks for, and which is the first; none but on the first stage.

    Shapes: → [rows, D] float32.
    """
    stage, mesh = answers.trained.stage, answers.trained.mesh
    for named in stage.canonical_parameters():
        if named.name == TIED and mesh.pipe.rank == 0 and mesh.data.rank == 0:
            return named.part.start, named.parameter.detach()[: named.part.length].float().cpu()
    return 0, torch.zeros(0, stage.config.d_model)


def gathered(own: np.ndarray) -> list[np.ndarray]:
    """Of all ranks, in order: that of the rows."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts
