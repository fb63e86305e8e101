"""How long collectives take, by where their ranks are. No torch.

A ring of n ranks moves (n - 1) / n of the whole for an all-gather or a reduce-scatter, twice that for an all-reduce
(Thakur et al. 2005; NCCL's "bus bandwidth"). Where a group spans nodes, each of its members on a node brings its share
of the node's adapters. A tree over nodes (NCCL's double trees) needs fewer steps, and its bytes cross the network once
a node and not once a rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megagpt.plan.job import Layout
from megagpt.plan.machine import Machine


@dataclass(frozen=True)
class Group:
    """n ranks, of which `on_node` share a node."""

    n: int
    on_node: int

    @property
    def nodes(self) -> int:
        """Nodes that it spans."""
        return -(-self.n // self.on_node)


def axis_groups(layout: Layout, machine: Machine) -> dict[str, Group]:
    """The groups of a layout: tensor, context, data (with context: who holds the same weights), shard (ZeRO's)."""
    node = machine.gpus_per_node
    rest = max(1, node // layout.tp)
    copies = layout.dp * layout.cp
    return {
        "tensor": Group(layout.tp, min(layout.tp, node)),
        "context": Group(layout.cp, min(layout.cp, rest)),
        "data": Group(copies, min(copies, rest)),
        "shard": Group(layout.shards, min(layout.shards, rest)),
    }


def all_reduce_s(size: float, group: Group, machine: Machine) -> float:
    """Seconds to sum `size` bytes over a group."""
    if group.n == 1:
        return 0.0
    ring = 2 * (group.n - 1) * _hop_s(group, machine) + 2 * (group.n - 1) / group.n * size / _bandwidth(group, machine)
    if group.nodes == 1:
        return ring
    hops = 2 * (math.log2(group.nodes) * _network_s(machine) + (group.on_node - 1) * _nvlink_s(machine))
    crossing = 2 * (group.nodes - 1) / group.nodes * size / (group.on_node * _adapter(machine))
    inside = 2 * (group.on_node - 1) / group.on_node * size / _inside(machine)
    return min(ring, hops + max(crossing, inside))


def gather_s(size: float, group: Group, machine: Machine) -> float:
    """Seconds to all-gather to, or reduce-scatter from, `size` bytes a rank."""
    if group.n == 1:
        return 0.0
    return (group.n - 1) / group.n * size / _bandwidth(group, machine) + (group.n - 1) * _hop_s(group, machine)


def send_s(size: float, layout: Layout, machine: Machine) -> float:
    """Seconds from one pipeline stage to the next: over NVLink where two stages fit a node."""
    share = _inside(machine) if stages_share_node(layout, machine) else _adapter(machine)
    return size / share + machine.constants.p2p_us * 1e-6


def stages_share_node(layout: Layout, machine: Machine) -> bool:
    """Whether a pipeline's messages stay within nodes."""
    return 2 * layout.gpus // layout.pp <= machine.gpus_per_node


def _bandwidth(group: Group, machine: Machine) -> float:
    """Of a ring: NVLink's, or what its members on a node have of the adapters."""
    return _inside(machine) if group.nodes == 1 else min(_inside(machine), group.on_node * _adapter(machine))


def _inside(machine: Machine) -> float:
    return machine.nvlink * machine.constants.nvlink


def _adapter(machine: Machine) -> float:
    return machine.node_network / machine.gpus_per_node * machine.constants.network


def _hop_s(group: Group, machine: Machine) -> float:
    return _nvlink_s(machine) if group.nodes == 1 else _network_s(machine)


def _nvlink_s(machine: Machine) -> float:
    return machine.constants.nvlink_us * 1e-6


def _network_s(machine: Machine) -> float:
    return machine.constants.network_us * 1e-6
