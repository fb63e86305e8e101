"""Text from a trained model: `generate`, and the engine beneath it."""

from megagpt.generate.generate import complete, generate
from megagpt.generate.request import Completion, Sampling

__all__ = ["Completion", "Sampling", "complete", "generate"]
