"""Findings as a table a detector, and the suspicions, ranked."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from megagpt.console import show
from megagpt.evaluate.diagnose.diagnose import Findings

TEXT = 40  # characters of a cell


def show_findings(console: Console, findings: Findings) -> None:
    """Evidence first, so that what is suspected stands at the end, where the eye is."""
    for evidence in findings.evidence:
        show(console, escape(evidence.title))
        table = Table(box=SIMPLE_HEAD)
        for i, column in enumerate(evidence.columns):
            table.add_column(column, justify="left" if i == 0 or column == "text" else "right")
        for row in evidence.rows:
            table.add_row(*(escape(cell[:TEXT]) for cell in row))
        if evidence.rows:
            show(console, table)
    strong = [one for one in findings.suspicions if one.strong]
    head = f"{findings.loss:.3f} nats per token over {findings.n_tokens:,} tokens of {findings.n_documents:,} texts. "
    show(console, head + ("Suspected, what explains most first:" if strong else "Nothing strange was found."))
    for i, one in enumerate(findings.suspicions, 1):
        if not one.strong:
            continue
        show(console, escape(f"{i}. {one.claim}"))
        worth = f"It explains {one.nats:.3f} ± {one.error:.3f} nats per token ({one.kind})."
        for line in (worth, *one.evidence, f"Try: {one.remedy}"):
            show(console, Padding(escape(line), (0, 0, 0, 3)))
    weak = [f"{one.kind} {one.nats:.3f}" for one in findings.suspicions if not one.strong]
    if weak:
        show(console, f"Too small or too uncertain to suspect: {', '.join(weak)}")
