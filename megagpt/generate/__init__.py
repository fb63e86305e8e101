"""Text from a trained model: `generate`, and the engine beneath it."""

from megagpt.generate.complete import complete
from megagpt.generate.generate import generate
from megagpt.generate.request import Completion, Sampling

__all__ = ["Completion", "Sampling", "complete", "generate"]
