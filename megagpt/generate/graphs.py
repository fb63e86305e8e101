"""Decoding under CUDA graphs: a step of small kernels costs the host one launch.

Shapes: B rows, D model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megagpt.model.cache import Cache

if TYPE_CHECKING:
    from megagpt.generate.stage import Stage

WARM_UP = 2  # runs before a capture: what is set up once is no part of it


class Graphs:
    """Of one cache, a graph for each number of rows, captured when that number is first met.

    A graph does the same work each time, and so attends all places of the cache. Its inputs are copied to where it
    reads them; a pass that is run again writes the same keys and values again, so that warming up does no harm.
    """

    def __init__(self, stage: Stage, cache: Cache) -> None:
        self.stage, self.cache = stage, cache
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def run(self, tokens_B1: Tensor, positions_B1: Tensor) -> Tensor:
        """A token of each of the first rows through the stage.  Shapes: → x_B1D, overwritten by the next run."""
        if len(tokens_B1) not in self.captured:
            self.captured[len(tokens_B1)] = self._capture(tokens_B1.clone(), positions_B1.clone())
        graph, tokens, positions, x_B1D = self.captured[len(tokens_B1)]
        tokens.copy_(tokens_B1)
        positions.copy_(positions_B1)
        graph.replay()
        return x_B1D

    def _capture(self, tokens: Tensor, positions: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self.stage(tokens, self.cache.whole_view(positions))
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x_B1D = self.stage(tokens, self.cache.whole_view(positions))
        return graph, tokens, positions, x_B1D
