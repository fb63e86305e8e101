"""Checkpoints written by numpy and safetensors, without an engine: what tests of reading them begin with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from megagpt.checkpoint.state import State, state_json
from megagpt.config import ModelConfig, RunConfig, plain

KEYS = ("weight", "exp_avg", "exp_avg_sq")
MODEL = ModelConfig(n_layers=2, d_model=16, n_heads=2, seq_len=8, vocab_size=37)


def gpt2_tensors(config: ModelConfig = MODEL, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a small GPT-2 by canonical name; written out by hand, so that no code of ours says what there is."""
    d, ff = config.d_model, config.ff_width
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.tokens.weight": (config.vocab, d),
        "embedding.positions": (config.seq_len, d),
        "head.norm.weight": (d,),
        "head.norm.bias": (d,),
    }
    for i in range(config.n_layers):
        for name, shape in {
            "norm_1.weight": (d,), "norm_1.bias": (d,), "norm_2.weight": (d,), "norm_2.bias": (d,),
            "attention.qkv.weight": (3 * d, d), "attention.qkv.bias": (3 * d,),
            "attention.out.weight": (d, d), "attention.out.bias": (d,),
            "mlp.up.weight": (ff, d), "mlp.up.bias": (ff,),
            "mlp.down.weight": (d, ff), "mlp.down.bias": (d,),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = shape
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def weights_and_moments(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Of a small GPT-2, by key."""
    tensors = {key: gpt2_tensors(seed=seed + i) for i, key in enumerate(KEYS)}
    tensors["exp_avg_sq"] = {name: values**2 for name, values in tensors["exp_avg_sq"].items()}
    return tensors


def write_checkpoint(
    run: Path,
    step: int = 1,
    tensors: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    *,
    n_files: int = 2,
    latest: bool = True,
    **state: Any,
) -> Path:
    """Write RUN/checkpoints/step-…, and `latest`; return its folder.

    tensors: key -> name -> values; by default a small GPT-2 with moments, another one for each step. n_files: files a
    key; matrices are cut by rows or, every second one, by columns.
    """
    if tensors is None:
        tensors = weights_and_moments(seed=3 * step)
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    index: dict[str, Any] = {}
    for key, named in tensors.items():
        files: list[dict[str, np.ndarray]] = [{} for _ in range(n_files)]
        index[key] = {}
        for number, (name, values) in enumerate(named.items()):
            dim = number % 2 if values.ndim > 1 else 0
            index[key][name] = {"shape": list(values.shape), "pieces": []}
            for i, rows in enumerate(np.array_split(np.arange(values.shape[dim]), n_files)):
                if not len(rows):
                    continue
                files[i][name] = np.ascontiguousarray(np.take(values, rows, dim))
                start = [int(rows[0]) if d == dim else 0 for d in range(values.ndim)]
                piece = {"file": f"{key}-{i:05}-of-{n_files:05}.safetensors", "start": start}
                index[key][name]["pieces"].append({**piece, "shape": list(files[i][name].shape)})
        for i, held in enumerate(files):
            save_file(held, folder / f"{key}-{i:05}-of-{n_files:05}.safetensors")
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "state.json").write_text(state_json(state_of(step, **state)))
    seal(folder, latest=latest)
    return folder


def state_of(step: int = 1, **changed: Any) -> State:
    """The state of a small run after a step."""
    config = plain(RunConfig(model=MODEL))
    fields: dict[str, Any] = {
        "step": step, "samples": 8 * step, "tokens": 64 * step, "lr": 0.1 / (step + 1),
        "counters": {"skipped_steps": 0}, "config": config, "data": {"data_path": ["a"]},
        "layout": {"tp": 2, "pp": 1, "dp": 1, "zero_stage": 1},
    }  # fmt: skip
    return State(**fields | changed)


def seal(folder: Path, latest: bool = True) -> None:
    """Write SHA256SUMS for the files as they are, and `latest`: what a writer with a fault in it would leave."""
    names: Sequence[str] = sorted(p.name for p in folder.iterdir() if p.name != "SHA256SUMS")
    sums = "".join(f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names)
    (folder / "SHA256SUMS").write_text(sums)
    if latest:
        digest = hashlib.sha256(sums.encode()).hexdigest()
        (folder.parent / "latest").write_text(f"{folder.name} {digest}\n")
