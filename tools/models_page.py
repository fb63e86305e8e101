"""Write docs/models.md from the presets: every model, its architecture, its recipe and their source.

python tools/models_page.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megagpt.cli import parse_run_config
from megagpt.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from megagpt.errors import ArgumentParser, run_cli
from megagpt.inventory.layers import block
from megagpt.presets import preset_names, preset_path
from megagpt.schedule import Schedule

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

INTRODUCTION = """# Models

*Written by `tools/models_page.py` from the files of `megagpt/presets`; change it there.*

`--preset NAME` starts from a published model with its recipe; later flags change what they name. Each file tells in
comments what was never published and what was taken instead, and where a published table contradicts itself.
`python tools/plan.py --preset NAME` with the flags of the last column shows stages and memory without starting
anything; `python tools/parity.py --preset NAME` trains the model, shrunken to a few thousand parameters with all that
makes it special, in every layout on this machine, and compares them with one process.

Parameters count every weight once, the tied matrix too, padding never; in brackets what the source states. Heads are
number x width. Batches are sequences of a context each. Decay is that of the weights. A layout is published where it
says so, and else one that fits devices of 80 GiB.
"""


@dataclass(frozen=True)
class Header:
    """What the comment on top of a preset says in a fixed form."""

    title: str
    citation: str
    n_params: int
    stated: str
    source: str
    layout: str | None
    layout_note: str


_FIRST_LINE = re.compile(
    r"(?P<title>.+) \((?P<citation>.+)\): (?P<params>[\d,]+) parameters, stated as (?P<stated>\S+)\."
)
_LAYOUT = re.compile(r"Layout: (?P<flags>.+?) \((?P<note>.+)\)")


def main() -> None:
    """Write the page."""
    ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


def page() -> str:
    """The whole page."""
    names = sorted((name for name in preset_names() if name != "tiny"), key=_order)  # tiny is of no paper
    rows = [row(name, parse_run_config(["--preset", name])) for name in names]
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    return "\n".join([INTRODUCTION, *("| " + " | ".join(line) + " |" for line in lines), ""])


def row(name: str, config: RunConfig) -> list[str]:
    """The cells of a model."""
    return [text(name, config) for text in COLUMNS.values()]


def read_header(name: str) -> Header:
    """The comment on top of a preset's file."""
    lines = []
    for line in preset_path(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# "))
    first = _FIRST_LINE.fullmatch(lines[0])
    assert first, f"{name}: {lines[0]}"
    begin = next(i for i, line in enumerate(lines) if line.startswith("Source: "))
    end = next(i for i, line in enumerate(lines) if i >= begin and line.endswith("."))
    layout = next(filter(None, map(_LAYOUT.fullmatch, lines)), None)
    return Header(
        title=first["title"],
        citation=first["citation"],
        n_params=int(first["params"].replace(",", "")),
        stated=first["stated"],
        source=" ".join(lines[begin : end + 1]).removeprefix("Source: "),
        layout=layout["flags"] if layout else None,
        layout_note=layout["note"] if layout else "",
    )


def _order(name: str) -> tuple[str, str, int]:
    """By year and source, then by size; what has no year comes last."""
    header = read_header(name)
    year = re.search(r"\d{4}", header.citation)
    return year[0] if year else "later", header.citation, header.n_params


def _model(name: str, _: RunConfig) -> str:
    header = read_header(name)
    return f"{header.title}<br>`{name}`"


def _parameters(name: str, _: RunConfig) -> str:
    header = read_header(name)
    return f"{header.n_params:,} ({header.stated})"


def _heads(model: ModelConfig) -> str:
    shared = f", {model.kv_heads} of keys" if model.grouped else ""
    return f"{model.n_heads} x {model.head_width}{shared}"


def _vocabulary(model: ModelConfig) -> str:
    scale = "" if model.logit_scale == 1 else f"; logits x {model.logit_scale:g}"
    head = ", bias of logits" if model.bias_head else ""
    return f"{model.vocab:,}; output matrix {'tied' if model.tied_embeddings else 'its own'}{head}{scale}"


def _block(model: ModelConfig) -> str:
    norm = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.norm]
    where = {"pre": f"{norm} before", "post": f"{norm} after"}[model.norm_position]
    ends = [name for name, there in (("embedding", model.embedding_norm), ("end", model.final_norm)) if there]
    also = f", and at the {' and the '.join(ends)}" if ends else ", none at the end"
    return f"{model.block.replace('_', ' ')}; {where}{also}; epsilon {_number(model.norm_eps)}"


def _biases(model: ModelConfig) -> str:
    held = block(model, 0).parameters
    parts = {"attention": "attention.out", "MLP": "mlp.down", "norms": "norm_1"}
    return ", ".join(name for name, module in parts.items() if f"{module}.bias" in held) or "none"


def _position(model: ModelConfig) -> str:
    if model.position == "rotary":
        pairs = "neighbours" if model.rotary_interleaved else "halves"
        scaling = f", {model.rotary_scaling} x {model.rotary_factor:g}" if model.rotary_factor != 1 else ""
        return f"rotary: base {model.rotary_base:g}, share {model.rotary_fraction:g}, {pairs}{scaling}"
    if model.position == "t5":
        return f"T5: {model.t5_buckets} buckets to {model.t5_max_distance}"
    names = {"transformer_xl": "relative, Transformer-XL", "alibi": "ALiBi"}
    return names.get(model.position, model.position)


def _mlp(model: ModelConfig) -> str:
    names = {
        "gelu_tanh": "GELU (tanh)", "gelu": "GELU", "relu": "ReLU", "relu2": "ReLU²", "swiglu": "SwiGLU",
        "geglu": "GEGLU",
    }  # fmt: skip
    factors = [f"rank {model.mlp_rank}"] * (model.mlp_rank is not None)
    factors += [f"{model.mlp_blocks} blocks"] * (model.mlp_blocks is not None)
    kind = "" if model.mlp == "dense" else ", ".join([f"; {model.mlp}", *factors])
    return f"{model.ff_width:,}, {names[model.activation]}{kind}"


def _dropout(model: ModelConfig) -> str:
    rates = (model.dropout_embedding, model.dropout_attention, model.dropout_residual)
    return "none" if not any(rates) else " / ".join(f"{rate:g}" for rate in rates)


def _init(model: ModelConfig) -> str:
    own = {"gpt2": f"N(0, {_number(model.init_std)}), residual / √2L", "normal": f"N(0, {_number(model.init_std)})"}
    return own.get(
        model.init, {"small": "small (GPT-NeoX)", "fan_in": "by inputs; embeddings N(0, 1)"}.get(model.init, "")
    )


def _batch(train: TrainConfig) -> str:
    if train.batch_steps:
        return ", ".join(f"{size} from step {step}" for step, size in train.batch_steps.items())
    if train.batch_ramp_tokens is None:
        return f"{train.global_batch_size}"
    by = train.batch_ramp_increment or train.batch_ramp_start
    grows = f"in {_number(train.batch_ramp_tokens)} tokens, by {by}"
    return f"{train.batch_ramp_start} → {train.global_batch_size} {grows}"


def _rate(optim: OptimConfig) -> str:
    peak, last = _number(optim.lr), _number(optim.lr * optim.min_lr_fraction)
    begin = f"from {_number(optim.warmup_from)}, " if optim.warmup_from else ""
    warmup = f"{_number(optim.warmup_tokens)} tokens" if optim.warmup_tokens else f"{optim.warmup_steps:,} steps"
    warm = f"warm-up {begin}{warmup}" if optim.warmup_tokens or optim.warmup_steps else "no warm-up"
    hold = f", {optim.hold_steps:,} steps held" if optim.hold_steps else ""
    end = ""
    if optim.decay_tokens or optim.decay_steps:
        end = f" by {_number(optim.decay_tokens)} tokens" if optim.decay_tokens else f" by step {optim.decay_steps:,}"
    falls = {
        "inverse_sqrt": ", then with 1 / √step" + (f", not below {last}" if optim.min_lr_fraction else ""),
        "constant": "",
        "wsd": f" → {last}, by a line in the last {optim.decay_fraction:g} of the run",
    }.get(optim.schedule, f" → {last}, {optim.schedule}{end}")
    return f"{peak}{falls}; {warm}{hold}"


def _optimizer(optim: OptimConfig) -> str:
    names = {"adamw": "AdamW", "adafactor_unfactored": "Adafactor, unfactored"}
    name = names.get(optim.optimizer, optim.optimizer.capitalize())
    if optim.optimizer.startswith("adafactor"):
        betas = f"{optim.beta1:g}, 1 - step^-{optim.beta2_power:g}"
    else:
        betas = f"{optim.beta1:g}, {optim.beta2:g}, epsilon {_number(optim.eps)}"
    times = " x rate²" if optim.weight_decay_times == "lr_squared" else ""
    ema = f"; average of weights {optim.ema_decay:g}" if optim.ema_decay is not None else ""
    return f"{name} {betas}; decay {optim.weight_decay:g}{times}; clip {optim.clip:g}{ema}"


def _loss(optim: OptimConfig) -> str:
    parts = [("z-loss", optim.z_loss), ("label smoothing", optim.label_smoothing)]
    return ", ".join(f"{name} {_number(value)}" for name, value in parts if value) or "plain"


def _layout(name: str, config: RunConfig) -> str:
    header = read_header(name)
    micro = f"micro-batch {config.train.micro_batch_size}"
    return f"`{header.layout}` ({header.layout_note}); {micro}" if header.layout else micro


def _source(name: str, _: RunConfig) -> str:
    header = read_header(name)
    return f"{header.citation}: {header.source}".replace("|", "\\|")


COLUMNS: dict[str, Callable[[str, RunConfig], str]] = {
    "model": _model,
    "parameters": _parameters,
    "layers": lambda _, c: str(c.model.n_layers),
    "d_model": lambda _, c: f"{c.model.d_model:,}",
    "heads": lambda _, c: _heads(c.model),
    "MLP": lambda _, c: _mlp(c.model),
    "context": lambda _, c: f"{c.model.seq_len:,}",
    "vocabulary": lambda _, c: _vocabulary(c.model),
    "block and norms": lambda _, c: _block(c.model),
    "biases": lambda _, c: _biases(c.model),
    "positions": lambda _, c: _position(c.model),
    "attention by layer": lambda _, c: ", ".join(map(str, c.model.attention)),
    "dropout: embedding / attention / residual": lambda _, c: _dropout(c.model),
    "initial weights": lambda _, c: _init(c.model),
    "batch": lambda _, c: _batch(c.train),
    "learning rate": lambda _, c: _rate(c.optim),
    "optimizer": lambda _, c: _optimizer(c.optim),
    "loss": lambda _, c: _loss(c.optim),
    "precision": lambda _, c: c.train.precision,
    "steps": lambda _, c: f"{c.train.train_steps:,}",
    "tokens": lambda _, c: _number(float(f"{Schedule(c).total_tokens:.3g}")),
    "layout": _layout,
    "source": _source,
}  # heading: (name of the preset, its configuration) -> the cell


def _number(value: float) -> str:
    """6e-05 → '6e-5', 260000000000 → '2.6e11', 0.02 → '0.02'."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}"
    digits, power = f"{value:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


if __name__ == "__main__":
    run_cli(main)
