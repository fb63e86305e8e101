"""Tables of measured runs, each form told by its header: `read_table` makes rows of them. No torch.

A table of the survey's form (source, model, layers, hidden, …; iteration_time_s or tflops_per_gpu, mfu_pct,
tokens_per_s_per_gpu) is what `--rows` takes; the others are as their publishers have them.

Sick rows, by rules that know nothing of a prediction: a run below 2 % of the best throughput of its model (the rule of
the table's README); a layout whose sizes do not multiply to its GPUs or batch; a stalled one. The last is a fault of
that cluster: messages waited for 0.6 to 1.3 s, whatever they carried (pairs of runs that differ in ZeRO alone are up to
24 times apart). Its mark: each micro-batch took more than 0.65 s and the run less than 5 % of the peak; or, with a
pipeline and a tensor axis within nodes, each took 0.5 s longer than its work does at a third of the peak.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import yaml

from megagpt.config import ModelConfig
from megagpt.errors import UserError
from megagpt.plan.job import Engine, Job, Layout, step_flops
from megagpt.plan.machine import machine
from megagpt.plan.rows.row import Row, Skipped
from megagpt.plan.rows.sources import (
    FSDP_COMPILED,
    MEGATRON_2021,
    MEGATRON_DEEPSPEED,
    NANOTRON,
    NEMO,
    NEMO_2023,
    XLA,
    Source,
    source_of,
)

Record = dict[str, str]
Read = Iterator[Row | Skipped]

_SHAPES = Path(__file__).with_name("shapes.yaml")
_WORST_SHARE = 0.02  # of the best throughput of a model
_GIB_OF_GB = 1e9 / 2**30


def read_table(path: Path) -> list[Row | Skipped]:
    """All rows of a table.  Raises: UserError where it cannot be read, or its header is of no known form."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            records = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--rows {path} cannot be read: {error}") from error
    header = set(records[0]) if records else set()
    for columns, reader in _FORMS:
        if columns <= header:
            try:
                return list(reader(records))
            except (KeyError, ValueError, TypeError, ArithmeticError) as error:
                raise UserError(f"--rows {path} has a row that cannot be read: {error!r}; mend or drop it") from error
    raise UserError(
        f"--rows {path} has the columns {', '.join(sorted(header)) or 'of an empty file'}, of no known form; "
        "give those of the survey: source, model, layers, hidden, heads, seq, vocab, tp, pp, dp, …"
    )


def is_table(path: Path) -> bool:
    """Whether a file begins with a header of a known form."""
    with path.open(encoding="utf-8", errors="replace") as file:
        header = set(next(csv.reader([file.readline()]), []))
    return any(columns <= header for columns, _ in _FORMS)


@cache
def shape(name: str, seq_len: int, n_layers: int = 0) -> ModelConfig:
    """A model of shapes.yaml. n_layers: of a proxy that has fewer."""
    listed = yaml.safe_load(_SHAPES.read_text(encoding="utf-8"))[name]
    layers, width, heads, kv_heads, ff, gated, vocab, tied = listed
    return ModelConfig(
        n_layers=n_layers or layers, d_model=width, n_heads=heads, n_kv_heads=kv_heads, d_ff=ff, seq_len=seq_len,
        vocab_size=vocab, tied_embeddings=tied, activation="swiglu" if gated else "gelu", position="rotary",
        norm="rmsnorm", bias_attention=False, bias_mlp=False,
    )  # fmt: skip


def _survey(records: list[Record]) -> Read:
    for record in records:
        words = record["source"]
        source = source_of(words)
        if source is None:
            yield Skipped(words[:40], "what its engine does is not known")
            continue
        why = _lacks(record)
        if why:
            yield Skipped(source.label, why)
            continue
        yield _survey_row(record, source)


def _lacks(r: Record) -> str:
    """Why a row of the survey cannot be predicted."""
    if not r["hidden"] or not (r["layers"] or r["params"]) or not r["gpus"]:
        return "its model or its GPUs are not stated"
    if not _gpu(r["gpu_type"]):
        return f"no such GPU is described: {r['gpu_type'] or 'not named'}"
    if "TPU" in r["gpu_type"]:
        return "a TPU"
    if "do not use" in r["check"]:
        return "the source contradicts itself"
    if not _number(r["seq"]):
        return "its sequence length is not stated"
    if not r["global_batch"] or not (r["micro_batch"] or r["dp"]):
        return "its batch is not stated"
    if not any(r[k] for k in ("iteration_time_s", "tflops_per_gpu", "mfu_pct", "tokens_per_s_per_gpu")):
        return "failed, or no time stated"
    return ""


def _survey_row(r: Record, source: Source) -> Row | Skipped:
    seq, D, V = int(_number(r["seq"])), int(_number(r["hidden"])), int(_number(r["vocab"]) or 50257)
    L = int(_number(r["layers"])) or round((_number(r["params"]) - V * D) / (12 * D * D))
    model, gpu = _survey_model(r, L, D, V, seq), _gpu(r["gpu_type"])
    network = source.network or ("ethernet-1600" if "1600 Gbps" in r["source"] else None)
    on = machine(gpu, network, source.gpus_per_node)
    job = Job(model, _survey_layout(r, source, L), _survey_engine(r, source), on)
    seconds = _step_s(r, job)
    if not seconds:
        return Skipped(source.label, "no time can be made of what is stated")
    memory = _number(r["mem_gb"]) if "analytic" not in r["note"] else 0.0
    return Row(source.label, f"{source.label}, {gpu}", r["model"], job, seconds, memory or None)


def _survey_layout(r: Record, source: Source, L: int) -> Layout:
    gpus, tp, pp = (int(_number(r[k]) or 1) for k in ("gpus", "tp", "pp"))
    note, recompute = r["note"], r["recompute"] or source.layout.get("recompute", "none")
    cp = int(_after(note, "CP=") or _after(r["sharding"], "CP=") or 1)
    dp, batch = max(1, gpus // (tp * pp * cp)), int(_number(r["global_batch"]))
    micro = int(_number(r["micro_batch"])) or (1 if pp > 1 else min(16, max(1, batch // dp)))
    virtual = max(int(_after(note, "VP=") or _after(note, "interleave=") or 1), 1)
    per_chunk = int(_after(note, "layers/virtual stage=") or 0)
    if per_chunk:
        virtual = max(1, L // pp // per_chunk)
    if source.label == "torchtitan" and pp > 1:  # its table gives what a data parallel rank takes a step
        micro, virtual = max(1, batch // dp // (2 * pp)), 2 if "Interleaved" in note else 1
    virtual = virtual if pp * virtual <= L else 1
    return Layout(
        gpus=gpus, tp=tp, pp=pp, cp=cp, dp=dp, virtual=virtual, zero=int(_number(r["zero_stage"])),
        micro_batch=micro, global_batch=batch,
        recompute="full" if recompute.startswith("full") else "selective" if "selective" in recompute else "none",
        sequence_parallel=tp > 1 and (bool(source.layout.get("sequence_parallel")) or "sequence" in recompute),
        schedule="interleaved" if virtual > 1 else "1f1b",
    )  # fmt: skip


def _survey_engine(r: Record, source: Source) -> Engine:
    """The source's engine, with what a row says of it."""
    engine = MEGATRON_DEEPSPEED if "ZeRO-3 (no model parallel)" in r["sharding"] else source.engine
    if "fp8" in r["precision"]:
        engine = replace(engine, fp8=True)
    if "fp32 grad" in r["precision"]:
        engine = replace(engine, grad_bytes=4)
    if re.search("async ?tp", r["note"], re.IGNORECASE):
        engine = replace(engine, overlap_tp=True)
    return engine


def _survey_model(r: Record, L: int, D: int, V: int, seq: int) -> ModelConfig:
    known = {"LLAMA3": "llama3", "Llama 3": "llama3", "Llama 2": "llama2"}
    for word, name in known.items():
        size = re.search(r"(\d+)B", r["model"])
        if word in r["model"] and size:
            return shape(f"{name}-{size[1]}b", seq)
    heads = int(_number(r["heads"])) or max(1, D // 128)
    while D % heads:
        heads -= 1
    nano = r["model"].startswith("Llama-style")
    return _dense(L, D, heads, seq, V) if not nano else shape("nanotron-3B", seq)


@cache
def _dense(n_layers: int, d_model: int, n_heads: int, seq_len: int, vocab_size: int) -> ModelConfig:
    """A GPT of this size; one object a size, so that what is cached for it is found at once."""
    return ModelConfig(
        n_layers=n_layers, d_model=d_model, n_heads=n_heads, seq_len=seq_len, vocab_size=vocab_size, activation="gelu"
    )  # fmt: skip


def _step_s(r: Record, job: Job) -> float:
    """Seconds of a step, from what the source prints: as a time, tokens, or FLOP/s of its own formula."""
    if r["iteration_time_s"]:
        return _number(r["iteration_time_s"])
    tokens = job.layout.global_batch * job.model.seq_len
    if r["tokens_per_s_per_gpu"]:
        return tokens / job.layout.gpus / _number(r["tokens_per_s_per_gpu"])
    rate = _number(r["tflops_per_gpu"]) * 1e12
    if not rate and r["mfu_pct"]:
        rate = _number(r["mfu_pct"]) / 100 * job.machine.flops
    if not rate:
        return 0.0
    if r["tflops_kind"].startswith("hardware(96"):
        return megatron_flops(job, 96) / rate / job.layout.gpus
    if "x3/4" in r["tflops_kind"]:
        return megatron_flops(job, 72) / rate / job.layout.gpus
    return step_flops(job.model, job.layout.global_batch) / rate / job.layout.gpus


def megatron_flops(job: Job, factor: int) -> float:
    """FLOPs of a step by Narayanan et al. 2021, eq. 3: factor B s l h² (1 + s / 6h + V / 16lh); 96 with recompute."""
    model = job.model
    h, s, layers = model.d_model, model.seq_len, model.n_layers
    return factor * job.layout.global_batch * s * layers * h * h * (1 + s / (6 * h) + model.vocab / (16 * layers * h))


def _nanotron(records: list[Record]) -> Read:
    best: dict[str, float] = {}
    for r in records:
        best[r["model"]] = max(best.get(r["model"], 0.0), _number(r["tokens_per_s_per_gpu"]))
    for r in records:
        gpus, tp, pp, dp, m, micro = (int(r[k]) for k in ("gpus", "tp", "pp", "dp", "grad_accum", "micro_batch"))
        model = shape(f"nanotron-{r['model']}", 4096)
        layout = Layout(
            gpus=gpus, tp=tp, pp=pp, dp=dp, zero=int(r["zero"]), micro_batch=micro, global_batch=dp * m * micro,
            sequence_parallel=tp > 1,
        )  # fmt: skip
        job = Job(model, layout, NANOTRON, machine("h100-80g", "ethernet-3200"))
        rate, failed = _number(r["tokens_per_s_per_gpu"]), r["status"] != "ok"
        seconds = None if failed or not rate else layout.global_batch * 4096 / gpus / rate
        odd = dp * tp * pp != gpus or dp * m * micro != int(r["global_batch"])
        slow = rate < _WORST_SHARE * best[r["model"]]
        mfu = _number(r["mfu_pct"]) / 100
        stalled = seconds is not None and _stalled(seconds / m, mfu, layout)
        memory = _number(r["memory_gb"]) or None
        yield Row(
            "nanotron sweep", f"nanotron {r['model']}", f"{r['model']} {_words(layout)}", job, seconds, memory, failed,
            not failed and (odd or slow or stalled or seconds is None),
        )  # fmt: skip


def _stalled(seconds: float, mfu: float, layout: Layout) -> bool:
    """Whether micro-batches of so many seconds waited for messages; see the top."""
    if seconds > 0.65 and mfu < 0.05:
        return True
    return layout.pp > 1 and layout.tp <= 8 and seconds - seconds * mfu * 3 > 0.5


def _vtrain(records: list[Record]) -> Read:
    for r in records:
        gpus, batch, micro, width, heads, n_layers, seq, tp, dp, pp = (
            int(r[k])
            for k in (
                *("# GPUs", "global batch", "micro batch", "hidden size", "attention heads", "# layers"),
                *("sequence length", "tensor parallelism", "data parallelism", "pipeline parallelism"),
            )
        )
        if tp * dp * pp != gpus:
            yield Skipped("vTrain", "its axes do not multiply to its GPUs")
            continue
        model = _dense(n_layers, width, heads, seq, 51200)
        layout = Layout(
            gpus=gpus, tp=tp, pp=pp, dp=dp, micro_batch=micro, global_batch=batch, recompute="full"
        )  # fmt: skip
        label = "vTrain, a node" if gpus <= 8 else "vTrain, 64-512 GPUs"
        job = Job(model, layout, MEGATRON_2021, machine("a100-80g", "infiniband-hdr-4"))
        name = f"{width} x {n_layers} {_words(layout)}"
        sweep = f"{label}, {width} x {n_layers}" + (f", {gpus} GPUs" if gpus <= 8 else "")
        yield Row(label, sweep, name, job, float(r["iteration time (ms)"]) / 1e3)


def _recipes(records: list[Record]) -> Read:
    for r in records:
        label, title = "NVIDIA recipes", f"{r['file']} {r['title']}".lower()
        name = _recipe_model(title)
        if name is None or "lora" in title:
            yield Skipped(label, "a mixture of experts" if "grok" in title else "LoRA: few gradients")
            continue
        xla = "maxtext" in title or "paxml" in title
        fine = "finetuning" in title
        seq = int(_number(r["seq"])) or (4096 if fine or "nemotron" in title or name.startswith("llama2") else 8192)
        seq = 2048 if name.startswith("gpt3") else seq
        model = shape(name, seq, int(_number(r["layers"])) if "proxy" in r["note"] else 0)
        gpus = int(r["gpus"])
        tp, pp, cp, virtual, micro = (int(_number(r[k])) or 1 for k in ("tp", "pp", "cp", "vp", "micro_batch"))
        if pp == 41:  # a slip of the table for "4,1": TP=1 CP=1 of 8 GPUs
            pp = 1
        if tp * pp * cp > gpus:  # proxies: pp of the whole model
            pp = max(1, gpus // (tp * cp))
        virtual = virtual if model.n_layers >= pp * virtual else 1
        layout = Layout(
            gpus=gpus, tp=tp, pp=pp, cp=cp, dp=max(1, gpus // (tp * pp * cp)), virtual=virtual, micro_batch=micro,
            zero=3 if xla else 1, shard=int(_number(r["fsdp"])), global_batch=int(r["global_batch"]),
            sequence_parallel=tp > 1, schedule="interleaved" if virtual > 1 else "1f1b",
        )  # fmt: skip
        engine = replace(XLA if xla else NEMO, fp8=r["precision"] == "FP8")
        gpu = {"H100": "h100-80g", "GB200": "gb200-186g"}[r["gpu_type"]]
        job = Job(model, layout, engine, machine(gpu))
        sweep = f"{label} {r['precision']} {r['gpu_type']}"
        yield Row(label, sweep, f"{name} {r['precision']} {_words(layout)}", job, float(r["step_time_s"]))


def _recipe_model(title: str) -> str | None:
    families = (
        ("llama2", "llama2"),
        ("llama", "llama3"),
        ("nemotron", "nemotron4"),
        ("gpt", "gpt3"),
        ("megatron", "gpt3"),
    )
    size = re.search(r"(\d+)b", title)
    if "grok" in title or size is None:
        return None
    return next((f"{name}-{size[1]}b" for word, name in families if word in title), None)


def _launcher(records: list[Record]) -> Read:
    """NeMo-Framework-Launcher conf/training/gpt3: 5b TP 1, micro-batch 4; 175b TP 8 PP 8 at that tag, selective."""
    for r in records:
        gpus, big = int(r["gpus"]), "175B" in r["model"]
        model = shape("gpt3-175b" if big else "gpt3-5b", 2048)
        tp, pp, micro = (4, 8, 1) if big else (1, 1, 4)
        layout = Layout(
            gpus=gpus, tp=tp, pp=pp, dp=gpus // (tp * pp), micro_batch=micro, zero=1, virtual=12 if big else 1,
            global_batch=2048, recompute="selective" if big else "none", sequence_parallel=big,
            schedule="interleaved" if big else "1f1b",
        )  # fmt: skip
        job = Job(model, layout, NEMO_2023, machine("a100-80g"))
        seconds = layout.global_batch * 2048 / float(r["tokens_per_s"])
        yield Row("NeMo launcher", f"NeMo {r['model']}", f"{r['model']} {_words(layout)}", job, seconds)


def _fms(records: list[Record]) -> Read:
    for r in records:
        for gpu, gpus, key in (("a100-80g", 128, "a100_128gpu"), ("h100-80g", 96, "h100_96gpu")):
            model, micro = shape(r["model"], 4096), int(r["batch_per_gpu"])
            recomputed = float(r[f"{key[:4]}_hfu"]) / float(r[f"{key[:4]}_mfu"])  # 4/3 where all blocks are
            layout = Layout(
                gpus=gpus, dp=gpus, zero=3, shard=8 if r["sharding"] == "HSDP" else 0, micro_batch=micro,
                global_batch=micro * gpus, recompute="full" if recomputed > 1.17 else "none",
            )  # fmt: skip
            rate = float(r[f"{key}_tokens_per_s_per_gpu"])
            job = Job(
                model, layout, FSDP_COMPILED, machine(gpu, "ethernet-1600" if gpu == "a100-80g" else "ethernet-3200")
            )
            yield Row("fms-fsdp", f"fms-fsdp {gpu}", f"{r['model']} {gpu}", job, micro * 4096 / rate)


def _context(records: list[Record]) -> Read:
    """NeMo's long sequences, with context parallelism: FP8. TFLOP/s count causal attention in full, as PaLM does."""
    for r in records:
        h100 = "H100" in r["section"]
        seq, gpus, batch = int(r["seqlen_k"]) * 1024, int(r["gpus"]), int(r["global_batch"])
        tp, pp, cp = int(r["tp"]), int(r["pp"]), int(r["cp"])
        if batch * tp * pp * cp < gpus:
            yield Skipped("NeMo context", "its data axis is longer than its batch")
            continue
        model = shape("llama2-7b" if h100 else "llama3-8b", seq)
        layout = Layout(
            gpus=gpus, tp=tp, pp=pp, cp=cp, dp=gpus // (tp * pp * cp), zero=1, global_batch=batch,
            sequence_parallel=tp > 1,
        )  # fmt: skip
        job = Job(model, layout, replace(NEMO, fp8=True), machine("h100-80g" if h100 else "b200-180g"))
        seconds = step_flops(model, batch) / float(r["tflops_per_gpu_with_cp"]) / 1e12 / gpus
        yield Row("NeMo context", r["section"], f"{seq // 1024}K {_words(layout)}", job, seconds)


def _words(layout: Layout) -> str:
    text = f"{layout.gpus} GPUs tp {layout.tp} pp {layout.pp} dp {layout.dp}"
    extra = (("cp", layout.cp), ("v", layout.virtual), ("zero", layout.zero + 1))
    text += "".join(f" {name} {n - (name == 'zero')}" for name, n in extra if n > 1)
    return f"{text} micro {layout.micro_batch} x {layout.micro_batches}"


def _gpu(words: str) -> str:
    if words.startswith("V100"):
        return "v100-16g" if "16GB" in words else "v100-32g"
    if words.startswith("A100"):
        return "a100-40g" if "40GB" in words else "a100-80g"
    if words.startswith("H200"):
        return "h200-141g"
    if words.startswith("H100"):
        return "h100-96g" if "HBM2e" in words else "h100-80g"
    return ""


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _after(text: str, word: str) -> str:
    found = re.search(re.escape(word) + r"(\d+)", text)
    return found[1] if found else ""


_FORMS: tuple[tuple[set[str], Callable[[list[Record]], Read]], ...] = (
    ({"source", "hidden", "tflops_per_gpu", "iteration_time_s"}, _survey),
    ({"grad_accum", "status", "memory_gb", "zero"}, _nanotron),
    ({"# GPUs", "iteration time (ms)"}, _vtrain),
    ({"step_time_s", "vp", "fsdp"}, _recipes),
    ({"nodes", "tokens_per_s", "source"}, _launcher),
    ({"a100_128gpu_tokens_per_s_per_gpu"}, _fms),
    ({"seqlen_k", "tflops_per_gpu_with_cp"}, _context),
)
