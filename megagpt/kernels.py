"""Which implementation each op runs: one choice for all, and exceptions by name. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.errors import UserError

CHOICES = ("auto", "cuda", "cpu", "reference")


@dataclass(frozen=True)
class Kernels:
    """`kernels["softmax"]` is the choice for softmax.

    auto: the kernel where there is one for the device, else plain PyTorch. cuda, cpu: that kernel, or an error.
    reference: plain PyTorch.
    """

    default: str = "auto"
    exceptions: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, op: str) -> str:
        return dict(self.exceptions).get(op, self.default)

    @staticmethod
    def parse(text: str) -> Kernels:
        """From "auto" or "auto,softmax=reference,norm=cpu". Raises UserError for anything else."""
        default, exceptions = "auto", []
        for part in filter(None, (p.strip() for p in text.split(","))):
            op, equals, choice = part.rpartition("=")
            if choice not in CHOICES:
                raise UserError(
                    f"train.kernels={text}: {choice!r} is no choice; use {' | '.join(CHOICES)}, or op=choice"
                )
            if equals:
                exceptions.append((op.strip(), choice))
            else:
                default = choice
        return Kernels(default, tuple(exceptions))


AUTO = Kernels()
