"""What figures depend on beside the code: for the head of a table and for its JSON. Needs torch and no more."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "deepspeed", "apex", "liger-kernel")


def conditions(program: str, device: str) -> dict[str, Any]:
    """Command, hardware and versions."""
    return {
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
        "machine": cpu() | (gpu() if device == "cuda" else {}),
        "versions": versions(),
    }


def cpu() -> dict[str, Any]:
    """The processor, and how busy it is."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def gpu() -> dict[str, Any]:
    """The current GPU; its driver where nvidia-smi tells."""
    properties = torch.cuda.get_device_properties()
    found = {
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", "--id=0"]
        told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        found["gpu_driver_and_power_limit"] = told
    return found


def versions() -> dict[str, str]:
    """Of python, of CUDA as torch was built with it, and of those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def headline(about: dict[str, Any]) -> str:
    """conditions() in one line."""
    machine = about["machine"]
    name = machine.get("gpu") or f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads"
    return f"{name}; " + ", ".join(f"{package} {version}" for package, version in about["versions"].items())
