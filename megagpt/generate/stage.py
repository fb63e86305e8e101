"""A model, or the pipeline stage of it that this process holds, and passes through it.

Shapes: B rows, T tokens of a pass, D model, V the whole vocabulary, N places whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.config.values import Partition
from megagpt.inventory import layers as inventory
from megagpt.model.cache import View
from megagpt.model.gpt import Embedding, Head, layer_list
from megagpt.model.stream import Stream
from megagpt.parallel.embedding import gather_logits
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.parameter import Named
from megagpt.plan.partition import stage_bounds


class Stage(nn.Module):
    """Neighbouring layers of the whole list, by their canonical names: all of them where there is one stage.

    They may be those of a run that trains, which then writes with the weights that it has.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, layers: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        self.names = [name for name, _ in layers]
        self.layers = nn.ModuleList(layer for _, layer in layers)

    @property
    def blocks(self) -> list[int]:
        """The numbers of its blocks."""
        return [int(name.removeprefix("blocks.")) for name in self.names if name.startswith("blocks.")]

    @property
    def weight(self) -> Tensor:
        """One of its parameters: for dtype and device."""
        return next(self.parameters())

    def canonical_parameters(self) -> list[Named]:
        """Its parameters under the names that the whole model has; a tied weight comes once."""
        found: dict[int, Named] = {}
        for layer_name, layer in zip(self.names, self.layers, strict=True):
            for name, parameter in layer.named_parameters():
                tied = layer_name == "head" and name == "tokens.weight" and self.config.tied_embeddings
                full_name = inventory.TIED if tied else f"{layer_name}.{name}"
                found.setdefault(id(parameter), Named(full_name, parameter, owned=True))
        return list(found.values())

    def forward(self, x: Tensor, view: View | None = None) -> Tensor:
        """Take a pass through this stage; without a view of a cache, by the attention of training.

        Shapes: x tokens_BT on the first stage, x_BTD on others → x_BTD.
        Comm: those of the layers over the model axis.
        """
        stream = Stream(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), view)
        for layer in self.layers:
            stream = stream if isinstance(layer, Head) else layer(stream)
        return stream.x

    def logits(self, x_ND: Tensor) -> Tensor:
        """On the last stage, of some places.  Shapes: → logits_NV, on each model rank.  Comm: all-gather."""
        logits_1NV = self.layers[-1]((x_ND[None],))
        return gather_logits(logits_1NV, self.config.vocab, self.mesh.model)[0]

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> float:
        """Mean cross-entropy in nats per token, by the attention of training: stages one after the other.

        Comm: activations from stage to stage, and the loss back to all of them.
        """
        pipe, (B, T) = self.mesh.pipe, tokens_BT.shape
        before = self.shift(None, (B, T))
        x_BTD = self(tokens_BT if before is None else before)
        self.shift(x_BTD, None)
        loss = torch.zeros((), device=self.weight.device)
        head = self.layers[-1]
        if isinstance(head, Head):
            loss = head.loss(head((x_BTD,)), labels_BT).float()
        if pipe.size > 1:
            dist.broadcast(loss, group=pipe.group, group_src=pipe.size - 1)
        return float(loss)

    def shift(self, x_BTD: Tensor | None, wanted: tuple[int, int] | None) -> Tensor | None:
        """Hand activations to the next stage, and take those of the one before, where there are any.

        wanted: rows and tokens of what comes.  Comm: one message each way over the pipe axis.
        """
        pipe, sent, received = self.mesh.pipe, None, None
        if x_BTD is not None and pipe.rank < pipe.size - 1:
            sent = dist.isend(x_BTD.contiguous(), group=pipe.group, group_dst=pipe.rank + 1)
        if wanted is not None and pipe.rank > 0:
            received = torch.empty(*wanted, self.config.d_model, dtype=self.weight.dtype, device=self.weight.device)
            dist.recv(received, group=pipe.group, group_src=pipe.rank - 1)
        if sent is not None:
            sent.wait()
        return received


def build_stage(config: ModelConfig, mesh: Mesh, empty: bool = False) -> Stage:
    """This process's stage in evaluation mode; stages are cut to take the same time.

    It has the first weights of seed 0; or it is `empty` (`Declared`), for who loads others.
    """
    bounds = stage_bounds(Partition("flops"), inventory.layers(config), mesh.pipe.size)
    mine = slice(bounds[mesh.pipe.rank], bounds[mesh.pipe.rank + 1])
    blueprints = layer_list(config, mesh.model, seed=0, empty=empty)[mine]
    layers = [(blueprint.name, blueprint.build()) for blueprint in blueprints]
    if mesh.pipe.size == 1 and config.tied_embeddings:
        first, last = layers[0][1], layers[-1][1]
        assert isinstance(first, Embedding) and isinstance(last, Head)
        last.tokens = first.tokens
    return Stage(config, mesh, layers).eval().requires_grad_(False)
