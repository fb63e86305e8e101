"""The metrics that GLUE names, by scikit-learn and SciPy. No torch.

Each takes the answers that are right and those that were given, [N], and returns a number, the higher the better; a
correlation is 0 where it is not defined (all answers alike).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megagpt.errors import UserError


def _accuracy(right_N: np.ndarray, given_N: np.ndarray) -> float:
    return float(np.mean(right_N == given_N))


def _f1(right_N: np.ndarray, given_N: np.ndarray) -> float:
    from sklearn.metrics import f1_score  # of the extra; takes a second

    return float(f1_score(right_N, given_N, zero_division=0.0))  # pyright: ignore[reportArgumentType]  # its stubs


def _matthews(right_N: np.ndarray, given_N: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef  # of the extra; takes a second

    return float(matthews_corrcoef(right_N, given_N))


def _pearson(right_N: np.ndarray, given_N: np.ndarray) -> float:
    from scipy.stats import pearsonr  # of the extra; takes a second

    return _defined(right_N, given_N, lambda: pearsonr(right_N, given_N)[0])


def _spearman(right_N: np.ndarray, given_N: np.ndarray) -> float:
    from scipy.stats import spearmanr  # of the extra; takes a second

    return _defined(right_N, given_N, lambda: spearmanr(right_N, given_N)[0])


FIGURES: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def _defined(right_N: np.ndarray, given_N: np.ndarray, correlation: Callable[[], Any]) -> float:
    if len(right_N) < 2 or np.ptp(right_N) == 0 or np.ptp(given_N) == 0:
        return 0.0
    found = float(correlation())
    return found if math.isfinite(found) else 0.0


def require_libraries() -> None:
    """Raise UserError before a run where what judges it is not installed."""
    missing = [name for name in ("sklearn", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"GLUE's metrics need {', '.join(missing)}; run: pip install 'megagpt[finetune]'")
