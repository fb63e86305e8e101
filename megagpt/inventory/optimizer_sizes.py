"""What an optimizer keeps of each parameter, in bytes; no torch (megagpt/optim/rules.py has the rules)."""

from __future__ import annotations

from megagpt.config import OptimConfig

MOMENTS = {"adam": 2, "adamw": 2, "adafactor": 0, "adafactor_unfactored": 2, "lion": 1, "muon": 2}


def state_bytes(optim: OptimConfig, params: int, block_params: int) -> int:
    """Bytes of moments, and of the average, for `params` elements of which `block_params` are in blocks.

    fp32 all of them. Muon keeps one moment of a block's matrices; the few norms and biases there count as if they were
    such. Adafactor's means over rows and columns, and the moments of its norms and biases, are too few to count.
    """
    n_moments = MOMENTS[optim.optimizer] * params
    if optim.optimizer == "muon":
        n_moments -= block_params
    if optim.ema_decay is not None:
        n_moments += params
    return 4 * n_moments
