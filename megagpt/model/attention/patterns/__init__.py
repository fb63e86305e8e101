"""Which keys a query may attend beside causality: a kind of pattern is a file here, and a line of PATTERNS."""

from megagpt.model.attention.patterns.bigbird import BigBird
from megagpt.model.attention.patterns.kind import PatternRule
from megagpt.model.attention.patterns.strided import Strided
from megagpt.model.attention.patterns.window import Window

PATTERNS: dict[str, type[PatternRule]] = {
    "dense": PatternRule,
    "window": Window,
    "strided": Strided,
    "bigbird": BigBird,
}
