"""The training of `make gpu-check`: some hundred steps of a preset on one device, by the engine or a plain loop."""

from __future__ import annotations

import dataclasses
import importlib.util
import resource
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megagpt import metrics
from megagpt.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from megagpt.data.loader import MicroBatch, micro_batches
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.plan.plan import Plan, make_plan
from megagpt.presets import preset_path
from megagpt.schedule import Schedule

Step = Callable[[int, Iterator[MicroBatch]], float | torch.Tensor]
"""Trains on a step's micro-batches; returns their mean loss."""

TEXT_BYTES = 1 << 23


def train(preset: str, device: str, steps: int, batch: int, dropout: float, kernels: str) -> dict[str, Any]:
    """Train in bf16; returns tokens/s, MFU (None where the device's peak is not known), losses and peak memory."""
    config = run_config(preset, steps, batch, dropout, kernels)
    plan = make_plan(config, 1)
    samples = Text(config.model)
    loop, how = (engine_loop, "engine") if importlib.util.find_spec("deepspeed") else (plain_loop, "plain PyTorch loop")
    losses = []
    with loop(config, plan, device) as train_step:
        warm_up = min(20, steps // 3)
        for step in range(steps):
            if step == warm_up:
                start = _now(device)
            positions = range(step * batch, (step + 1) * batch)
            batches = micro_batches(samples, config, positions, config.model.seq_len, dp_rank=0, dp_size=1)
            losses.append(train_step(step, batches))
        time_s = _now(device) - start
    losses = [float(loss) for loss in losses]
    speed = metrics.tokens_per_s((steps - warm_up) * plan.batch_tokens, time_s)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    peak = metrics.peak_flops(name, "bf16")
    return {
        "kernels": kernels,
        "trained_by": how,
        "parameters": plan.params,
        "seq_len": config.model.seq_len,
        "batch_sequences": batch,
        "dropout": dropout,
        "steps": steps,
        "step_time_s": time_s / (steps - warm_up),
        "tokens_per_s": speed,
        "mfu": metrics.mfu(metrics.model_flops_per_s(speed, plan.flops_per_token), peak, 1) if peak else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "losses": losses[:: max(1, steps // 50)],
        "peak_memory_mib": round(_peak_memory(device) / 2**20),
    }


def run_config(preset: str, steps: int, batch: int, dropout: float, kernels: str) -> RunConfig:
    """A preset's model and optimizer for a short run in bf16."""
    sections = yaml.safe_load(preset_path(preset).read_text())
    model = ModelConfig(**sections["model"])
    dropouts = dict.fromkeys(("dropout_embedding", "dropout_attention", "dropout_residual"), dropout)
    return RunConfig(
        model=dataclasses.replace(model, vocab_size=model.vocab_size or 4096, **dropouts),
        optim=OptimConfig(**(sections.get("optim", {}) | {"warmup_steps": min(20, steps // 2)})),
        train=TrainConfig(
            train_steps=steps, micro_batch_size=batch, global_batch_size=batch, precision="bf16", kernels=kernels
        ),
    )


class Text:
    """Samples of the bytes of Python's own library: something to learn, that is everywhere."""

    def __init__(self, model: ModelConfig) -> None:
        self.length = model.seq_len + 1
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        self.text = np.frombuffer(b"".join(file.read_bytes() for file in files)[:TEXT_BYTES], dtype=np.uint8)

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, i: int) -> np.ndarray:
        start = np.random.default_rng(i).integers(0, len(self.text) - self.length)
        return self.text[start : start + self.length].astype(np.int64)


@contextmanager
def engine_loop(config: RunConfig, plan: Plan, device: str) -> Iterator[Step]:
    """This project's engine."""
    # Only here is DeepSpeed known to be installed.
    from megagpt.processes.start import distributed  # the same
    from megagpt.train.step.engine import Engine

    with distributed(pp=1, dp=1, tp=1) as (mesh, _):
        engine = Engine(config, plan, mesh)
        yield lambda step, batches: engine.train_step(step, batches).loss
        engine.close()


@contextmanager
def plain_loop(config: RunConfig, plan: Plan, device: str) -> Iterator[Step]:
    """What the engine does in bf16, where DeepSpeed is missing: bf16 weights, and fp32 copies that AdamW steps on."""
    model = GPT(config.model, SINGLE, config.train.seed, kernels=config.train.kernels)
    model.to(device, torch.bfloat16)
    weights = list(model.parameters())
    masters = [weight.detach().float().requires_grad_() for weight in weights]
    optim, schedule = config.optim, Schedule(config)
    settings = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps, "fused": True}
    groups = [
        {"params": [m for m in masters if m.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [m for m in masters if m.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **settings)

    def step(step: int, batches: Iterator[MicroBatch]) -> torch.Tensor:
        (batch,) = batches
        tokens_BT, labels_BT, ids_B = (t.to(device) for t in (batch.tokens_BT, batch.labels_BT, batch.sample_ids_B))
        loss = model(tokens_BT, ids_B, labels_BT)
        loss.backward()
        for weight, master in zip(weights, masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        return loss.detach()

    yield step


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_memory(device: str) -> int:
    """Of the tensors on a GPU; on a CPU of the whole process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
