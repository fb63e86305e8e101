"""What a rank knows without the others: versions, settings, data, memory, limits."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.cuda.nccl

import megagpt
from megagpt.config import RunConfig, plain
from megagpt.data.indexed.meta import read_meta
from megagpt.data.opened import OpenedData, with_text
from megagpt.errors import UserError
from megagpt.plan.plan import make_plan

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "tokenizers", "sentencepiece")


@dataclass(frozen=True)
class Facts:
    """JSON-able. versions, settings: must be equal on all ranks. data: likewise, of the first rank of a host.

    memory_free, memory_needed: bytes for one rank, on its device; needed by the plan, 0 where it could not be made.
    checkpoint_bytes: of one checkpoint. problem: why data or plan cannot be used, for this rank.
    """

    rank: int
    host: str
    device: str
    versions: dict[str, str]
    settings: dict[str, str]
    data: dict[str, str]
    memory_free: int
    memory_needed: int
    checkpoint_bytes: int
    open_files: int
    problem: str | None


def collect(config: RunConfig, rank: int, world_size: int, local_size: int, reads_data: bool) -> Facts:
    """Look around. reads_data: whether this rank hashes the data; one of a host is enough.

    local_size: ranks on this host, among which its memory is shared out where there is no GPU.
    """
    problem, data, needed, checkpoint_bytes = None, {}, 0, 0
    settings = flat(plain(config))
    try:
        config, opened = with_text(config)
        if reads_data:
            data = data_facts(opened)
        plan = make_plan(config, world_size)
        needed = plan.stages[rank // (plan.dp * plan.tp)].memory.total
        checkpoint_bytes = 12 * plan.params  # fp32 weights and two moments, each once
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}; check --data-path"
    return Facts(
        rank=rank,
        host=socket.gethostname(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        versions=versions(),
        settings=settings,
        data=data,
        memory_free=torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else free_memory() // local_size,
        memory_needed=needed,
        checkpoint_bytes=checkpoint_bytes,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        problem=problem,
    )


def versions() -> dict[str, str]:
    """Of everything that ranks must have alike, megagpt's own source by its hash."""
    found = {"python": platform.python_version(), "megagpt": source_hash()}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    found["compiled ops"] = "yes" if list(Path(megagpt.__path__[0]).glob("_C.*.so")) else "no"
    found["CUDA of torch"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["GPU"] = torch.cuda.get_device_name()
        found["NVIDIA driver"] = driver_version()
    return found


def source_hash() -> str:
    """Of megagpt's Python files, their names and contents."""
    digest, root = hashlib.sha256(), Path(megagpt.__path__[0])
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def driver_version() -> str:
    """As the kernel module tells it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def data_facts(data: OpenedData) -> dict[str, str]:
    """Hash of each index, size of each .bin and what its side file says of it, and the tokenizer's hash."""
    facts = {}
    for prefix, tokenizer in zip(data.config.data_path.prefixes, data.tokenizers, strict=True):
        with open(f"{prefix}.idx", "rb") as file:
            facts[f"{prefix}.idx"] = hashlib.file_digest(file, "sha256").hexdigest()[:12]
        meta, n_bytes = read_meta(prefix), os.path.getsize(f"{prefix}.bin")
        facts[f"{prefix}.bin"] = f"{n_bytes} bytes" + (f", {meta.bin_sha256[:12]} by its side file" if meta else "")
        facts[f"tokenizer of {prefix}"] = tokenizer.sha256[:12] if tokenizer else "not recorded"
    return facts


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"model": {"n_layers": 4}} -> {"model.n_layers": "4"}."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: str(value)}
    return found


def free_memory() -> int:
    """Bytes of this host that programs can still have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
