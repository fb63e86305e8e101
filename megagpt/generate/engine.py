"""The inference engine: requests in, tokens out, in any layout; requests join and leave between passes.

Each rank of a model is given the same requests and calls `step` as often. What it decides follows from them and from
the tokens that were drawn, which the last stage tells all: so nothing else is agreed on.
Shapes: B rows, T tokens of a pass, D model, N places whose logits are wanted, V the whole vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.generate.batching import Batching, Group, Pass, Sample
from megagpt.generate.draw import logprobs_of
from megagpt.generate.graphs import Graphs
from megagpt.generate.limits import Limits
from megagpt.generate.request import Piece, Request, TokenLogprobs
from megagpt.generate.write import Writer
from megagpt.inventory.attention import cached_places
from megagpt.model.cache import Cache
from megagpt.model.position.rotary import scaling_of
from megagpt.parallel.mesh import Mesh

if TYPE_CHECKING:
    from megagpt.data.tokenizers.tokenizer import Tokenizer
    from megagpt.generate.stage import Stage

M = TypeVar("M")
MAX_SCORED = 256  # places whose logits are held at once while a prompt is scored


class Engine:
    """Holds a stage of a model, its caches, and the requests under way.

    Memory: `inventory.attention.cached_numbers` of each row, beside the weights.
    """

    def __init__(self, stage: Stage, limits: Limits, tokenizer: Tokenizer | None = None) -> None:
        self.stage, self.limits, self.mesh = stage, limits, stage.mesh
        n_groups = self.mesh.pipe.size
        n_rows = -(-limits.n_rows // n_groups)
        self.caches = [self._cache(n_rows) for _ in range(n_groups)]
        # Of one process: what a stage receives, and collectives, are left to the host.
        graphed = stage.weight.device.type == "cuda" and self.mesh.world_size == 1
        self.graphs = Graphs(stage, self.caches[0]) if graphed else None
        self.batching = Batching([self._group(i, n_rows) for i in range(n_groups)])
        self.in_flight: deque[Pass | None] = deque([None] * (n_groups - 1))  # by stage, between steps
        self.x_BTD: Tensor | None = None  # what came from the stage before
        self.writer = Writer(tokenizer, limits.n_places)  # at work where `draws`
        self.n_added = 0

    def _cache(self, n_rows: int) -> Cache:
        stage, weight = self.stage, self.stage.weight
        return Cache(
            stage.config,
            stage.blocks,
            self.mesh.model.size,
            n_rows=n_rows,
            n_places=self.limits.n_places,
            dtype=weight.dtype,
            device=weight.device,
        )

    def _group(self, number: int, n_rows: int) -> Group:
        """With what all stages say alike of the model, since each decides for itself."""
        config, n_places = self.stage.config, self.limits.n_places
        n_kept = min(cached_places(config, layer, n_places) for layer in range(config.n_layers))
        scaling = scaling_of(config)
        shares = scaling.length(1) == scaling.length(n_places)  # else keys turn by the length that they are read at
        return Group(number, n_rows, self.limits.chunk, self.caches[number].move, n_kept, shares)

    @property
    def draws(self) -> bool:
        """Whether this rank draws the tokens: the first one of the last stage."""
        return self.mesh.pipe.rank == self.mesh.pipe.size - 1 and self.mesh.model.rank == 0

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return len(self.batching) == 0

    def add(self, request: Request) -> int:
        """Take a request in; returns its number, which its pieces carry.

        Raises UserError where the model cannot take it.
        """
        request.check(self.stage.config.vocab, self.limits.n_places)
        number, self.n_added = self.n_added, self.n_added + 1
        for index in range(request.sampling.n_samples):
            sample = Sample(number, request, index)
            if sample.n_window > self.limits.n_places:
                sample.slide(self.limits.n_places)
            self.batching.waiting.append(sample)
        return number

    def cancel(self, number: int) -> None:
        """Give a request up: its rows are free after the pass that they are in."""
        for sample in self.batching:
            if sample.number == number:
                sample.finish = "cancelled"
                self.writer.forget(sample)
        self.batching.drop_ended()

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """One pass through each stage; returns what the pass that leaves the last one adds to texts.

        Comm: those of the layers; with stages, activations to the next one; the drawn tokens to all ranks of the model.
        """
        rank = self.mesh.pipe.rank
        self.in_flight.appendleft(self.batching.next_pass())
        mine, before, leaving = self.in_flight[rank], self.in_flight[rank - 1], self.in_flight.pop()
        x_BTD = None if mine is None else self._run(mine)
        self.x_BTD = self.stage.shift(x_BTD, None if before is None else before.shape)
        if leaving is None:
            return []
        pieces = self._pieces(leaving, x_BTD) if x_BTD is not None and rank == self.mesh.pipe.size - 1 else []
        pieces = from_last_stage(pieces, self.mesh)
        for sample, piece in zip(leaving.samples, pieces, strict=True):
            sample.tokens += piece.tokens
            sample.finish = sample.finish or piece.finish
        self.batching.passed(leaving, self.limits.n_places)
        return [piece for piece in pieces if piece.tokens or piece.prompt or piece.finish or piece.text]

    def _run(self, mine: Pass) -> Tensor:
        device = self.stage.weight.device
        view = self.caches[mine.group.number].view(mine.first_row, mine.starts, mine.counts, mine.n_tokens)
        if self.mesh.pipe.rank > 0:
            assert self.x_BTD is not None
            return self.stage(self.x_BTD, view)
        tokens = [token for sample, count in mine.items for token in sample.window(count)]
        tokens_BT = torch.tensor(tokens, device=device).view(mine.shape)
        if self.graphs and mine.n_tokens == 1 and mine.first_row == 0:
            return self.graphs.run(tokens_BT, view.positions_BT)
        return self.stage(tokens_BT, view)

    def _pieces(self, done: Pass, x_BTD: Tensor) -> list[Piece]:
        """What each row's text gets by a pass; empty ones on the ranks that do not draw."""
        x_ND, ends = x_BTD.flatten(0, 1), list(accumulate(done.counts))
        scored = self._score(done, x_ND)
        ended = [draws and sample.sampling.only_scores for sample, draws in zip(done.samples, done.draws, strict=True)]
        drawing = [i for i, draws in enumerate(done.draws) if draws and not ended[i]]
        logits_NV = None
        if drawing:
            logits_NV = self.stage.logits(x_ND[[ends[i] - 1 for i in drawing]])
        if not self.draws:
            return [Piece(0, 0)] * len(done.samples)
        pieces = [
            Piece(s.number, s.index, prompt=tuple(p), finish=(s.finish or "length") if end else None)
            for s, p, end in zip(done.samples, scored, ended, strict=True)
        ]
        if logits_NV is not None:
            drawn = self.writer.write([done.samples[i] for i in drawing], logits_NV)
            for i, piece in zip(drawing, drawn, strict=True):
                pieces[i] = replace(piece, prompt=pieces[i].prompt)
        return pieces

    def _score(self, done: Pass, x_ND: Tensor) -> list[list[TokenLogprobs]]:
        """By row, of the prompt's tokens that a pass predicts, if asked for; nothing predicts the first one.

        The places of all rows are taken together, some at a time.
        """
        scored: list[list[TokenLogprobs]] = [[] for _ in done.samples]
        wanted: list[tuple[int, int, int]] = []  # row, place in the pass, token
        place = 0
        for row, (sample, count) in enumerate(done.items):
            request, first = sample.request, sample.n_dropped + sample.n_done + 1
            if sample.sampling.prompt_logprobs and not sample.n_written:
                if first == 1 and sample.sampling.first_scored == 0:
                    scored[row].append(TokenLogprobs(request.prompt[0], None))
                end = min(first + count, len(request.prompt))
                numbers = range(max(first, sample.sampling.first_scored), end)
                wanted += [(row, place + number - first, request.prompt[number]) for number in numbers]
            place += count
        for start in range(0, len(wanted), MAX_SCORED):
            rows, places, tokens = zip(*wanted[start : start + MAX_SCORED], strict=True)
            n_likeliest = [done.samples[row].sampling.logprobs or 0 for row in rows]
            most = max(n_likeliest)
            found = logprobs_of(self.stage.logits(x_ND[list(places)]), tokens, most)
            for row, n, entry in zip(rows, n_likeliest, found, strict=True):
                scored[row].append(entry if n == most else replace(entry, likeliest=entry.likeliest[:n]))
        return scored


def from_last_stage(value: M, mesh: Mesh) -> M:
    """What the first rank of the last stage holds, on every rank of the model.

    Comm: a broadcast of a short object over the model axis of the last stage, and one over the pipe axis.
    """
    box = [value]
    if mesh.model.size > 1 and mesh.pipe.rank == mesh.pipe.size - 1:
        dist.broadcast_object_list(box, group=mesh.model.group, group_src=0)
    if mesh.pipe.size > 1:
        dist.broadcast_object_list(box, group=mesh.pipe.group, group_src=mesh.pipe.size - 1)
    return box[0]
