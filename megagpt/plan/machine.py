"""Machines as data: what a GPU, its links and its network could do, and which share of that runs reach. No torch.

`machines/gpus.yaml` and `machines/links.yaml` hold what makers state; `machines/constants.yaml` what was fitted on
measured runs (`tools/plan_check.py --fit`). A file of `tools/calibrate.py` has the same keys for the machine at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megagpt.errors import UserError, nearest

_FOLDER = Path(__file__).with_name("machines")


@dataclass(frozen=True)
class Constants:
    """How much of what is stated is reached, and what work costs that no rate explains: one set for a GPU type.

    matrix, flash, memory: share of the peak FLOP rate that large matrix products and flash attention reach, and of the
    memory bandwidth that elementwise kernels do.  fp8: the matrix share's factor where the peak is that of 8 bits.
    half_depth: the inner dim at which a matrix product reaches half its rate.  misaligned: factor of the rate where a
    dim is no multiple of 64.  traffic: bytes that unfused elementwise kernels move, over what fused ones do.
    accumulate: passes over its bytes that a micro-batch's gradient takes where no kernel adds it up on the way.
    nvlink, network: share of a link's bandwidth that collectives reach.  nvlink_us, network_us: a step of a ring.
    p2p_us: a hand-over between pipeline stages.
    host_us: what the host takes to launch the kernels of one pass through a block.  async_host_us: the same for the
    collectives of a tensor-parallel block where they run as asynchronous calls.  async_rank_us: for each rank of the
    axis more, where these meet a pipeline's messages to other nodes.
    tp_hidden, dp_hidden: share of a communication that work can hide, where the engine overlaps them.
    step_ms: what a step takes beside all that: optimizer launch, logging, data.
    kept: bytes that blocks of unfused kernels keep, over those that the backward pass needs.
    logit_bytes: of a logit and its copies.  buffers_gib: communicators, workspaces, fragments.
    usable: share of the memory that can be filled.
    """

    matrix: float = 0.75
    flash: float = 0.45
    memory: float = 0.8
    fp8: float = 0.75
    half_depth: float = 200.0
    misaligned: float = 0.8
    traffic: float = 3.0
    accumulate: float = 2.0
    nvlink: float = 0.75
    network: float = 0.7
    nvlink_us: float = 4.0
    network_us: float = 15.0
    p2p_us: float = 100.0
    host_us: float = 800.0
    async_host_us: float = 1200.0
    async_rank_us: float = 1500.0
    tp_hidden: float = 0.6
    dp_hidden: float = 0.7
    step_ms: float = 10.0
    kept: float = 1.2
    logit_bytes: float = 12.0
    buffers_gib: float = 1.5
    usable: float = 0.94


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind in nodes. Rates in FLOP/s and bytes/s; node_network: of a node, one direction."""

    name: str
    flops: float
    flops_fp8: float
    memory_bytes: float
    bandwidth: float
    nvlink: float
    multiprocessors: int
    watts: float
    gpus_per_node: int
    node_network: float
    constants_name: str
    constants: Constants

    def with_constants(self, constants: Constants) -> Machine:
        """The same machine, of which this much is reached."""
        return replace(self, constants=constants)


def gpu_names() -> list[str]:
    """What `--gpu` takes."""
    return list(_read("gpus.yaml"))


def link_names() -> list[str]:
    """What `--network` takes."""
    return list(_read("links.yaml"))


@cache
def machine(gpu: str, network: str | None = None, gpus_per_node: int | None = None) -> Machine:
    """The machine of these names. network: default 8 adapters of the GPU's generation.

    gpu: one of `gpu_names`, or a YAML file that `tools/calibrate.py` wrote.
    Raises: UserError where there is no such GPU or network.
    """
    stated = _calibrated(Path(gpu)) if gpu.endswith((".yaml", ".yml")) else _named("--gpu", gpu, _read("gpus.yaml"))
    name = network or _network_of(str(stated["constants"]))
    link = _named("--network", name, _read("links.yaml"))
    return Machine(
        name=gpu,
        flops=stated["tflops"] * 1e12,
        flops_fp8=stated["tflops_fp8"] * 1e12,
        memory_bytes=stated["memory_gib"] * 2**30,
        bandwidth=stated["memory_gb_s"] * 1e9,
        nvlink=stated["nvlink_gb_s"] * 1e9,
        multiprocessors=stated["multiprocessors"],
        watts=stated["watts"],
        gpus_per_node=gpus_per_node or stated["gpus_per_node"],
        node_network=link * 1e9,
        constants_name=stated["constants"],
        constants=Constants(**stated["fitted"]) if "fitted" in stated else constants_of(stated["constants"]),
    )


@cache
def constants_of(name: str) -> Constants:
    """What was fitted for a GPU type."""
    known = {field.name for field in fields(Constants)}
    return Constants(**{key: value for key, value in _read("constants.yaml").get(name, {}).items() if key in known})


def write_constants(fitted: dict[str, Constants]) -> None:
    """Write what was fitted over `machines/constants.yaml`; types that are not given stay."""
    kept = _read("constants.yaml") | {
        name: {field.name: float(f"{getattr(found, field.name):.4g}") for field in fields(Constants)}
        for name, found in fitted.items()
    }
    head = "# Written by tools/plan_check.py --fit: what measured runs reach; see Constants in machine.py.\n"
    (_FOLDER / "constants.yaml").write_text(head + yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")


def _network_of(constants: str) -> str:
    return {"v100": "infiniband-edr-8", "a100": "infiniband-hdr-8"}.get(constants, "infiniband-ndr-8")


def _named(flag: str, name: str, table: dict[str, Any]) -> Any:
    if name in table:
        return table[name]
    near = nearest(name, table)
    hint = f"did you mean {near}?" if near else f"use one of {', '.join(table)}"
    raise UserError(f"{flag} {name} is not known; {hint}")


def _calibrated(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--gpu {path} cannot be read: {error}; write it with tools/calibrate.py") from error
    stated = _read("gpus.yaml")["h100-80g"].keys() - {"max_achievable"}
    missing = sorted(stated - found.keys()) if isinstance(found, dict) else sorted(stated)
    if missing:
        raise UserError(f"--gpu {path} has no {', '.join(missing)}; write it with tools/calibrate.py")
    return found


@cache
def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((_FOLDER / name).read_text(encoding="utf-8")) or {}
