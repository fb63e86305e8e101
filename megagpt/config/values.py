"""Settings that are more than a number or a word. Each has `parse` and `str`, which are the inverse of each other: text
stands in files and flags, the value everywhere else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Annotated, TypeVar

from megagpt.errors import home_expanded, require

T = TypeVar("T")
Short = Annotated[T, "short"]
"""A setting that has a flag without its section too: --tp beside --parallel.tp."""

MAX_DATASETS = 32766  # of a blend: its choice is kept as int16, as in Megatron


@dataclass(frozen=True)
class DataPath:
    """The datasets that are read, by the prefix of their files; several are blended, by weights or else by their sizes.

    Weights and shares are decimals, so that they are written as they were typed.
    """

    prefixes: tuple[str, ...] = ()
    weights: tuple[Decimal, ...] = ()

    def __len__(self) -> int:
        return len(self.prefixes)

    @staticmethod
    def parse(words: Sequence[str]) -> DataPath:
        """From ("A",), ("A", "B"), or ("0.7", "A", "0.3", "B"), as Megatron-LM reads them.

        A prefix of weight 0 is left out; one that is there twice counts once, with the sum of its weights.
        Raises UserError naming the word that is wrong.
        """
        words = words.split() if isinstance(words, str) else words
        if len(words) < 2:
            return DataPath(tuple(map(home_expanded, words)))
        key, example = "data.data_path", "try 0.7 A 0.3 B, or A B"
        shown = f'{key}="{" ".join(words)}"'
        if not any(map(_is_number, words)):
            return DataPath(_few(tuple(dict.fromkeys(map(home_expanded, words)))))
        weights, prefixes = words[::2], map(home_expanded, words[1::2])
        pairs = len(words) % 2 == 0
        require(pairs, shown, "must be prefixes, or pairs of weight and prefix", example, key)
        for weight in weights:
            ok = _is_number(weight) and 0 <= float(weight) < math.inf
            require(ok, f'{shown}: weight "{weight}"', "must be a number, 0 or above", example, key)
        sums: dict[str, Decimal] = {}
        for weight, prefix in zip(weights, prefixes, strict=True):
            sums[prefix] = sums.get(prefix, Decimal(0)) + Decimal(weight)
        read = {prefix: weight for prefix, weight in sums.items() if float(weight) > 0}
        require(bool(read), shown, "must have a weight above 0", example, key)
        return DataPath(_few(tuple(read)), tuple(read.values()))

    @property
    def words(self) -> list[str]:
        """What `parse` takes. A prefix may have spaces."""
        if not self.weights:
            return list(self.prefixes)
        return [word for pair in zip(map(str, self.weights), self.prefixes, strict=True) for word in pair]

    def __str__(self) -> str:
        return " ".join(self.words)


def _few(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    ok, key = len(prefixes) <= MAX_DATASETS, "data.data_path"
    require(ok, f"{key} of {len(prefixes)} datasets", f"must have at most {MAX_DATASETS}", "merge some", key)
    return prefixes


def _is_number(word: str) -> bool:
    try:
        return not math.isnan(float(word))
    except ValueError:
        return False


@dataclass(frozen=True)
class Split:
    """Shares of train, validation and test, of any sum."""

    shares: tuple[Decimal, Decimal, Decimal]
    given: int = 3

    @staticmethod
    def parse(text: str) -> Split:
        """From "969,30,1"; missing shares are 0.  Raises UserError."""
        key, words = "data.split", [word.strip() for word in text.split(",")]
        shown, example = f'{key}="{text}"', "try 969,30,1"
        ok = len(words) <= 3 and all(re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", word) for word in words)
        require(ok, shown, "must be one to three numbers, none negative", example, key)
        require(0 < sum(map(float, words)) < math.inf, shown, "must have a share above 0", example, key)
        first, second, third = (Decimal(word) for word in [*words, "0", "0"][:3])
        return Split((first, second, third), len(words))

    def __str__(self) -> str:
        return ",".join(map(str, self.shares[: self.given]))


@dataclass(frozen=True)
class BatchSteps(Mapping[int, int]):
    """Sequences of a batch by the first step, counted from 1, that has so many."""

    sizes: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def parse(text: str) -> BatchSteps:
        """From "256@1,512@50001", or "" for none.  Raises UserError."""
        if not text:
            return BatchSteps()
        key, found = "train.batch_steps", []
        shown, example = f"{key}={text!r}", "write 256@1,512@50001: growing sizes, the first from step 1 on"
        for part in text.split(","):
            match = re.fullmatch(r"\s*([1-9][0-9]{0,17})@([1-9][0-9]{0,17})\s*", part)
            require(match is not None, shown, f"has {part!r}, which is no SIZE@STEP", example, key)
            found.append((int(match[2]), int(match[1])))  # pyright: ignore[reportOptionalSubscript] # required above
        for (step, size), (next_step, next_size) in pairwise(found):
            grows = next_step > step and next_size > size
            require(grows, shown, f"does not grow at {f'{next_size}@{next_step}'!r}", example, key)
        require(found[0][0] == 1, shown, "does not say what step 1 has", example, key)
        return BatchSteps(tuple(found))

    def __getitem__(self, step: int) -> int:
        return dict(self.sizes)[step]

    def __iter__(self) -> Iterator[int]:
        return (step for step, _ in self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __str__(self) -> str:
        return ",".join(f"{size}@{step}" for step, size in self.sizes)


@dataclass(frozen=True)
class StepSet:
    """Steps, counted from 1, as ranges with both ends."""

    ranges: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def parse(text: str) -> StepSet:
        """From "57,60-62".  Raises UserError."""
        key, found = "faults.skip_steps", []
        for part in filter(None, (p.strip() for p in text.split(","))):
            match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            wrong = f"has {part!r}, which is no step or range"
            require(1 <= first <= last, f"{key}={text!r}", wrong, "write 57,60-62", key)
            found.append((first, last))
        return StepSet(tuple(found))

    def __iter__(self) -> Iterator[int]:
        return (step for first, last in self.ranges for step in range(first, last + 1))

    def __str__(self) -> str:
        return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in self.ranges)


@dataclass(frozen=True)
class Partition:
    """How blocks become pipeline stages: evened out by one of METHODS, or as `counts` lists them, a number a stage."""

    METHODS = ("flops", "parameters", "uniform")

    method: str = "flops"
    counts: tuple[int, ...] = ()

    @staticmethod
    def parse(text: str) -> Partition:
        """From a method, or "3,4,4,3".  Raises UserError."""
        if text in Partition.METHODS:
            return Partition(text)
        key, words = "parallel.partition", text.split(",")
        known = f"use {', '.join(Partition.METHODS)}, or block counts such as 3,4,4,3"
        ok = all(re.fullmatch(r"\s*-?[0-9]{1,9}\s*", word) for word in words)
        require(ok, f"{key}={text!r}", "is not known", known, key)
        return Partition("counts", tuple(map(int, words)))

    def __str__(self) -> str:
        return ",".join(map(str, self.counts)) if self.counts else self.method
