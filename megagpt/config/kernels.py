"""Which implementation each op runs: one choice for all, and exceptions by name. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.errors import require
from megagpt.model.attention import IMPLEMENTATIONS

CHOICES = ("auto", "cuda", "cpu", "reference")
ATTENTION_CHOICES = ("auto", *IMPLEMENTATIONS)


@dataclass(frozen=True)
class Kernels:
    """`kernels["softmax"]` is the choice for softmax.

    auto: the kernel where there is one for the device, else plain PyTorch. cuda, cpu: that kernel, or an error.
    reference: plain PyTorch. For attention see `ATTENTION_CHOICES`; where it is not named, a choice for softmax asks
    for the steps around that, as attention=reference asks for the plain softmax.
    """

    default: str = "auto"
    exceptions: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, op: str) -> str:
        named = dict(self.exceptions)
        if op == "attention" and op not in named:
            softmax = self["softmax"]
            return "softmax" if softmax in ("cuda", "cpu") else softmax
        if op == "softmax" and op not in named and named.get("attention") == "reference":
            return "reference"
        return named.get(op, self.default)

    @staticmethod
    def parse(text: str) -> Kernels:
        """From "auto" or "auto,attention=flex,norm=cpu". Raises UserError for anything else."""
        default, exceptions = "auto", []
        for part in filter(None, (p.strip() for p in text.split(","))):
            op, equals, choice = (p.strip() for p in part.rpartition("="))
            choices = ATTENTION_CHOICES if op == "attention" else CHOICES
            wanted = "is no choice for attention" if op == "attention" else "is no choice"
            known = f"use {' | '.join(choices)}, or op=choice"
            require(choice in choices, f"train.kernels={text}: {choice!r}", wanted, known, "train.kernels")
            if equals:
                exceptions.append((op, choice))
            else:
                default = choice
        return Kernels(default, tuple(exceptions))

    def __str__(self) -> str:
        return ",".join([self.default, *(f"{op}={choice}" for op, choice in self.exceptions)])


AUTO = Kernels()
