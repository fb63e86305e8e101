"""This process's pipeline stage, of the layer list, as DeepSpeed's pipeline engine trains it."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megagpt.config import RunConfig
from megagpt.inventory.layers import TIED
from megagpt.model.classifier import Classified
from megagpt.model.gpt import Head, layer_list
from megagpt.model.loss import PLAIN, LossTerms
from megagpt.model.stream import Stream
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.parameter import Named, give_memory
from megagpt.train.step.grad_norm import nan_to_gradient

if TYPE_CHECKING:
    from megagpt.plan.plan import Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class GPTStage(PipelineModule):
    """The layers of one pipeline stage, by DeepSpeed's pipeline module.

    Differs from its base in two things: the bounds come from the plan, and of a tied layer only the shared weight
    counts as a copy (the base would drop the final norm from the clip norm as well).
    """

    def __init__(self, config: RunConfig, plan: Plan, mesh: Mesh) -> None:
        self.plan_bounds, self.terms = list(plan.bounds), loss_terms(config)
        kernels = config.train.kernels
        recompute, seed = config.parallel.recompute, config.train.seed
        layers = layer_list(config.model, mesh.model, seed, recompute, kernels, empty=True, lora=config.lora)
        self.precision = config.train.precision
        self.names = [layer.name for layer in layers]
        specs = [LayerSpec(layer.kind, *layer.arguments) for layer in layers]
        self.is_tied = config.model.tied_embeddings
        if self.is_tied and config.lora.rank is None:  # frozen copies stay equal by themselves
            for end in (0, -1):
                layer = layers[end]
                specs[end] = TiedLayerSpec("tied", layer.kind, *layer.arguments, tied_weight_attr="tokens.weight")
        topology = PipeModelDataParallelTopology(num_pp=mesh.pipe.size, num_mp=mesh.model.size, num_dp=mesh.data.size)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its partition; the plan's table says it better
            super().__init__(specs, topology=topology, loss_fn=self._loss)
        for named in self.canonical_parameters():
            named.parameter.ds_pipe_replicated = not named.owned  # type: ignore[attr-defined]

    def _build(self) -> None:
        super()._build()
        give_memory_here(self, self.precision)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self.plan_bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def forward(self, forward_input: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        output = super().forward(forward_input)
        return output.wire if isinstance(output, Stream) else output

    def _loss(self, outputs: Tensor | Classified, targets: tuple[Tensor, ...]) -> Tensor:
        head = self.forward_funcs[-1]
        assert isinstance(head, Head)
        terms = self.terms if head.training else PLAIN
        return nan_to_gradient(head.loss(outputs, targets, terms))

    def canonical_layers(self) -> list[tuple[str, nn.Module]]:
        """This stage's layers under the names that the whole model has."""
        return list(zip(self.names[self._local_start : self._local_stop], self.forward_funcs, strict=True))

    def canonical_parameters(self) -> list[Named]:
        """This stage's parameters under the names that the whole model has; the copy of a tied weight is not owned."""
        found = []
        for layer_name, layer in self.canonical_layers():
            for name, parameter in layer.named_parameters():
                is_copy = layer_name == "head" and name == "tokens.weight" and self.is_tied
                full_name = TIED if is_copy else f"{layer_name}.{name}"
                found.append(Named(full_name, parameter, owned=not is_copy))
        return found


def give_memory_here(module: nn.Module, precision: str) -> None:
    """Memory on this rank's device, in the run's precision, for all parameters of a module that were made `empty`."""
    accelerator = get_accelerator()
    assert accelerator is not None
    for parameter in module.parameters():
        give_memory(parameter, torch.device(accelerator.current_device_name()), DTYPES[precision])


def loss_terms(config: RunConfig) -> LossTerms:
    """What this run's training adds to the loss."""
    return LossTerms(config.optim.label_smoothing, config.optim.z_loss, config.finetune.lm_weight)
