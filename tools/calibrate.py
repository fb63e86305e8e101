"""Measure the machine at hand, and write a file that tools/plan.py --gpu reads.

python tools/calibrate.py --out machine.yaml
torchrun --nproc-per-node 8 tools/calibrate.py --out machine.yaml    # collectives too
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.plan.machine import Constants
from megagpt.processes.preflight.rates import all_reduce_line, copy_rate, half_depth, host_us, matrix_rates

MIB = 2**20


def main() -> int:
    """Measure, and write on the first rank."""
    args = _flags().parse_args()
    n, on_gpu = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rates = matrix_rates(device, dtype, 8192 if on_gpu else 1024)
    best, half = half_depth(rates)
    memory = copy_rate(device, (1024 if on_gpu else 64) * MIB)
    constants = replace(Constants(), matrix=1.0, memory=1.0, nvlink=1.0, half_depth=half, host_us=host_us(device))
    link = memory / 2
    if n > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
        link, step_us = all_reduce_line(device, (MIB, 8 * MIB, 64 * MIB))
        constants = replace(constants, nvlink_us=step_us)
    if int(os.environ.get("RANK", "0")) == 0:
        _write(args.out, args.watts, n, best, memory, link, constants, device)
        print(
            f"{best / 1e12:.3g} TFLOP/s, half of it at depth {half:.0f}; {memory / 1e9:.3g} GB/s; written to {args.out}"
        )
    if n > 1:
        dist.destroy_process_group()
    return 0


def _write(
    path: Path,
    watts: float,
    n: int,
    best: float,
    memory: float,
    link: float,
    constants: Constants,
    device: torch.device,
) -> None:
    """The keys of megagpt/plan/machines/gpus.yaml, and what is reached of them."""
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    size = properties.total_memory if properties else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / n
    machine = {
        "constants": "a100",  # names the network's generation; what is reached stands below
        "tflops": best / 1e12,
        "tflops_fp8": best / 1e12,
        "memory_gib": size / 2**30,
        "memory_gb_s": memory / 1e9,
        "nvlink_gb_s": link / 1e9,
        "multiprocessors": properties.multi_processor_count if properties else torch.get_num_threads(),
        "watts": watts,
        "gpus_per_node": n,
        "fitted": asdict(constants),
    }
    try:
        path.write_text(yaml.safe_dump(machine, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error}") from error


def _flags() -> ArgumentParser:
    parser = ArgumentParser(prog="tools/calibrate.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the YAML file to write")
    parser.add_argument("--watts", type=float, default=400.0, help="what a device may draw (default 400)")
    return parser


if __name__ == "__main__":
    run_cli(main)
