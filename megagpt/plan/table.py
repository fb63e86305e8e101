"""What a run shows before it starts: its configuration and its plan, as rich renderables for 80 columns and more."""

from __future__ import annotations

from rich.box import SIMPLE, SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from megagpt.config import SECTIONS, RunConfig, plain
from megagpt.plan.plan import Plan, Stage
from megagpt.schedule import Schedule


def config_table(config: RunConfig) -> Table:
    """Every setting, a row a section; what differs from the default is bold, with a star."""
    table = Table(
        title="configuration (* not the default)",
        title_justify="left",
        box=SIMPLE,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    default = RunConfig()
    for name in SECTIONS:
        table.add_row(name, _settings(getattr(config, name), getattr(default, name)))
    return table


def plan_table(config: RunConfig, plan: Plan) -> RenderableType:
    """Batch arithmetic, sizes, and a row a stage: its ranks, layers, parameters, estimated memory."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column()
    for name, text in _facts(config, plan):
        facts.add_row(name, text)
    return Group(facts, "", _Stages(config, plan))


def _settings(section: object, default: object) -> Text:
    """`name=value*  name=value …`; what is off by default and still is (None, False, no words) is left out."""
    text = Text()
    defaults = plain(default)
    for name, value in plain(section).items():
        changed = value != defaults[name]
        if value in (None, [], "", False) and not changed:
            continue
        shown = " ".join(value) if isinstance(value, list) else str(value)
        text.append(f"{name}=", style="dim")
        text.append(f"{shown}*" if changed else shown, style="bold" if changed else "")
        text.append("  ")
    return text or Text("nothing set", style="dim")


def _facts(config: RunConfig, plan: Plan) -> list[tuple[str, str]]:
    model, train = config.model, config.train
    zero = f"ZeRO {plan.zero_stage}"
    if plan.zero_stage != config.parallel.zero_stage:
        zero = f"no ZeRO (dp 1 leaves {config.parallel.zero_stage} nothing to share out)"
    layout = f"{plan.world_size} processes: pp {plan.pp}, dp {plan.dp}, tp {plan.tp}; {zero}"
    batch = f"{train.global_batch_size:,} sequences of {model.seq_len:,} = {plan.batch_tokens:,} tokens a step"
    factors = f"{train.micro_batch_size} (micro-batch) * {plan.micro_batches} * {plan.dp} (dp)"
    work = f"{_flop(plan.flops_per_token)} a token, {_flop(plan.flops_per_token * plan.batch_tokens)} a step"
    rows = f"{model.vocab:,} tokens, padded to {plan.vocab_padded:,}: {plan.vocab_local:,} rows a rank"
    schedule = Schedule(config)
    if len(schedule.phases) > 1:
        batch += f" (from {schedule.batch_size(0):,} of {schedule.seq_len(0):,} at the first)"
    tokens = schedule.total_tokens
    run = f"{train.train_steps:,} steps, {_count(tokens)} tokens ({tokens / plan.params:.3g} a parameter)"
    facts = [
        ("layout", layout),
        ("batch", f"{batch}; {factors}"),
        ("model", f"{_count(plan.params)} parameters, {work} (forward and backward)"),
        ("vocabulary", rows),
        ("run", f"{run}, {_flop(tokens * plan.flops_per_token)}"),
        ("start", _start(plan)),
    ]
    if plan.pp > 1:
        facts.append(("pipeline", _bubble(plan)))
    return facts


def _start(plan: Plan) -> str:
    most = max(stage.memory.start for stage in plan.stages)
    return f"{_mib(most, wide=True)} MiB on a rank at the most, before the optimizer has its states"


def _bubble(plan: Plan) -> str:
    text = (
        f"{100 * plan.bubble_fraction:.0f} % of a step is bubble: {plan.pp} stages, {plan.micro_batches} micro-batches"
    )
    if plan.micro_batches < plan.pp:
        text += "; it never fills: use a larger global batch, or smaller micro-batches"
    return text


class _Stages:
    """The table of stages, as wide as there is room for."""

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        self._config, self._plan = config, plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = _stages(self._config, self._plan, wide=True)
        fits = Measurement.get(console, options.update(width=_WIDEST), wide).maximum <= options.max_width
        yield wide if fits else _stages(self._config, self._plan, wide=False)


_WIDEST = 1000  # columns


def _stages(config: RunConfig, plan: Plan, wide: bool) -> Table:
    """wide: also with the parameters of a stage as logical tensors, and larger memories in MiB too."""
    title = f"estimated memory of one rank in MiB ({config.train.precision}"
    title += ", optimizer in host memory)" if config.parallel.offload_optimizer else ")"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", padding=(0, int(wide), 0, 0))
    for heading in ("stage", "ranks", "layers"):
        table.add_column(heading, no_wrap=wide, overflow="fold")
    counted = ("params", "local") if wide else ("local",)
    for heading in (*counted, "weights", "grads", "optim", "activ", "logits", "total"):
        table.add_column(heading, justify="right", no_wrap=wide, overflow="fold")
    for number, stage in enumerate(plan.stages):
        table.add_row(*_stage_row(number, stage, plan, wide))
    return table


def _stage_row(number: int, stage: Stage, plan: Plan, wide: bool) -> list[str]:
    per_stage = plan.dp * plan.tp  # rank = (pipe * dp + data) * tp + model
    ranks = _span(number * per_stage, (number + 1) * per_stage - 1)
    memory = stage.memory
    optimizer = memory.optimizer + memory.host
    sizes = (memory.weights, memory.gradients, optimizer, memory.activations, memory.logits, memory.total)
    counts = [_count(stage.params)] * wide + [_count(stage.params_local)]
    layers = _layers(stage, plan) if wide else _layers(stage, plan).replace(" + ", " ")
    return [str(number), ranks, layers, *counts, *(_mib(size, wide) for size in sizes)]


def _mib(size: int, wide: bool) -> str:
    """Bytes in MiB; where there is no room, from 10,000 on in GiB, with a G."""
    return f"{size / 2**20:,.0f}" if wide or size < 10_000 * 2**20 else f"{size / 2**30:,.0f}G"


def _layers(stage: Stage, plan: Plan) -> str:
    """`emb + 0-8`: block i is layer i + 1 of the list."""
    is_first, is_last = stage.first_layer == 0, stage.last_layer == plan.bounds[-1] - 1
    blocks = _span(stage.first_layer - 1 + is_first, stage.last_layer - 1 - is_last)
    return ("emb + " if is_first else "") + blocks + (" + head" if is_last else "")


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _count(n: float) -> str:
    """124439808 → '124.4M', 1.5e9 → '1.5B': four digits."""
    digits, power = _thousands(n)
    return digits + ("", "k", "M", "B", "T", "e15", "e18", "e21", "e24")[power]


def _flop(n: float) -> str:
    """854438400 → '854.4 MFLOP'."""
    digits, power = _thousands(n)
    return f"{digits} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y')[power]}FLOP"


def _thousands(n: float) -> tuple[str, int]:
    """Four digits, and the power of 1000 that they are multiplied with."""
    power = min((len(f"{n:.0f}") - 1) // 3, 8)
    return f"{n / 1000**power:.4g}", power
