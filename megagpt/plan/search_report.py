"""What a search shows: the best layouts that run today, beside the best possible; what they take; why not others."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megagpt.plan.footprint import MEMORY_KINDS
from megagpt.plan.machine import Machine
from megagpt.plan.search import Found, Search, lacks
from megagpt.plan.step import STEP_KINDS

_GIB = 2**30


@dataclass(frozen=True)
class Bill:
    """What a run of so many tokens takes. price: money for a GPU-hour, or None."""

    tokens: float
    price: float | None = None

    def lines(self, found: Found) -> list[tuple[str, str]]:
        """Days, GPU-hours, energy, money."""
        seconds, layout, machine = self.tokens / found.tokens_per_s, found.job.layout, found.job.machine
        hours = seconds / 3600 * layout.gpus
        energy = hours * machine.watts / 1e6
        lines = [
            ("run", f"{self.tokens:.3g} tokens in {seconds / 86400:.1f} days: {hours:,.0f} GPU-hours"),
            ("energy", f"{energy:,.1f} MWh of the GPUs at the {machine.watts:.0f} W that they may draw"),
        ]
        if self.price is not None:
            lines.append(("price", f"{hours * self.price:,.0f} at {self.price:g} a GPU-hour"))
        return lines


def search_page(today: Search | None, possible: Search, machine: Machine, bill: Bill, command: str) -> RenderableType:
    """Both searches, the best of each in detail. today: None where nothing that fits runs today."""
    parts: list[RenderableType] = []
    if today is not None:
        parts += [
            layouts_table("best layouts that run today", today.best),
            details(today.best[0], machine, bill, command),
        ]
    else:
        parts.append(Text("no layout that fits runs today"))
    parts += [
        layouts_table("best layouts with what published engines do beyond that", possible.best),
        details(possible.best[0], machine, bill, ""),
        rejected_table(possible),
    ]
    return Group(*parts)


def layouts_table(title: str, found: tuple[Found, ...]) -> Table:
    """A row a layout: sizes, what it takes, and what megagpt lacks for it."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headings = (
        "tp",
        "pp",
        "dp",
        "cp",
        "micro",
        "ZeRO",
        "schedule",
        "recompute",
        "seq par",
        "GiB",
        "s",
        "TFLOP/s",
        "MFU %",
    )
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for f in found:
        layout, machine = f.job.layout, f.job.machine
        schedule = layout.schedule if layout.virtual == 1 else f"{layout.schedule} x{layout.virtual}"
        tflops = f.step.tflops_per_gpu(layout.gpus)
        table.add_row(
            *(str(n) for n in (layout.tp, layout.pp, layout.dp, layout.cp, layout.micro_batch, layout.zero)),
            *(schedule if layout.pp > 1 else "-", layout.recompute, "yes" if layout.sequence_parallel else "no"),
            *(f"{f.footprint.total / _GIB:.1f}", f"{f.step.seconds:.3g}", f"{tflops:.0f}"),
            f"{100 * tflops * 1e12 / machine.flops:.1f}",
        )
    return table


def details(found: Found, machine: Machine, bill: Bill, command: str) -> Table:
    """A layout: step time and memory by kind, the run's bill, what megagpt lacks or the command that runs it."""
    step, kept = found.step, found.footprint.fullest
    kinds = ", ".join(f"{kind} {step.kinds[kind]:.3g}" for kind in STEP_KINDS if step.kinds[kind] > 1e-3 * step.seconds)
    memory = ", ".join(f"{kind} {kept[kind] / _GIB:.1f}" for kind in MEMORY_KINDS if kept[kind] > 1e-3 * _GIB)
    stages = " ".join(f"{sum(rank.values()) / _GIB:.0f}" for rank in found.footprint.ranks[:16])
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column()
    tokens = f"{found.tokens_per_s:,.0f} tokens/s, {found.tokens_per_s / found.job.layout.gpus:,.0f} a GPU"
    facts.add_row("rate", tokens)
    facts.add_row("step, s", f"{step.seconds:.3g}: {kinds}; hidden beside work: data {step.data_hidden:.3g}")
    facts.add_row("memory, GiB", f"{memory}; of {machine.memory_bytes / _GIB:.0f}")
    if len(found.footprint.ranks) > 1:
        facts.add_row("by stage", stages + (" …" if len(found.footprint.ranks) > 16 else ""))
    for name, text in bill.lines(found):
        facts.add_row(name, text)
    missing = lacks(found.job.layout)
    if command:
        facts.add_row("command", Text(command))
    elif missing:
        facts.add_row("lacking", f"{', '.join(missing)}: megagpt does not run it today")
    return facts


def rejected_table(search: Search) -> Table:
    """Why other layouts were not taken."""
    table = Table(title="layouts not taken", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layouts", justify="right")
    table.add_column("why")
    for why, count in sorted(search.rejected.items(), key=lambda item: -item[1]):
        table.add_row(f"{count:,}", why)
    return table


def run_command(found: Found, start: str) -> str:
    """What starts this layout. start: flags that name the model, "--preset gpt3-175b"."""
    layout = found.job.layout
    flags = [
        "deepspeed --hostfile hosts examples/pretrain_gpt.py",
        start,
        f"--tp {layout.tp} --pp {layout.pp} --zero-stage {layout.zero or 1}",
        f"--micro-batch-size {layout.micro_batch} --global-batch-size {layout.global_batch} --precision bf16",
    ]
    if layout.recompute == "full":
        flags.append("--recompute")
    return " ".join(flags)
